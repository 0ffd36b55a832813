"""A real vLLM server answers as experts, blends and `auto`, through the openai client."""

import asyncio
import os

import openai
import pytest
import served_pico
import vllm_server

from mergekit_mediator import MediatorModel

KEY = "secret"
ENGINE = "--dtype float32 --enable-lora --max-loras 6 --max-lora-rank 16 --max-model-len 128"
PROMPTS = [p for name in served_pico.WORDS for p in served_pico.prompts(name, 10, seed=1)]
MIXTURES = {
    "dense": {},
    "math": {"math": 1.0},
    "code": {"code": 1.0},
    "chat": {"chat": 1.0},
    "math=0.6,code=0.4": {"math": 0.625, "code": 0.375},  # in eighths
    "chat=0.25,code=0.75": {"code": 0.75, "chat": 0.25},
    "math=0.3": {"math": 0.25},
}


@pytest.fixture(scope="module")
def address(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    options = [*ENGINE.split(), "--enforce-eager", "--api-key", KEY, "--served-model-name", "pico"]
    settings = {"MEDIATOR_CACHE": str(folder / "cache"), "MEDIATOR_BLENDS": "3"}
    with vllm_server.served(artifact, folder, *options, **settings) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def model(artifact):
    return MediatorModel.from_pretrained(artifact, dtype="float32")


def answer(client, model, prompt, **options):
    """A greedy answer with the decision that came with it."""
    settings = {"max_tokens": 8, "temperature": 0, **options}
    return client.completions.create(model=model, prompt=prompt, **settings)


def decision(response):
    return response.model_extra["mediator"]


def test_the_models_are_listed(client):
    assert {m.id for m in client.models.list()} >= {"pico", "math", "code", "chat", "dense", "auto"}


def test_answers_in_mixed_batches_are_those_of_the_routed_model(address, model):
    """Seven mixtures in one batch; on CPUs this is where vLLM answers `dense` with an adapter."""
    # a blend that finds no place is refused with status 429, and the client tries again
    client = openai.AsyncOpenAI(base_url=address, api_key=KEY, max_retries=20)
    asked = [(name, prompt) for prompt in PROMPTS for name in (*MIXTURES, "pico")]

    async def run():
        limit = asyncio.Semaphore(16)

        async def one(name, prompt):
            async with limit:
                return (await answer(client, name, prompt)).choices[0].text

        return await asyncio.gather(*(one(*pair) for pair in asked))

    answers = dict(zip(asked, asyncio.run(run()), strict=True))
    expected = {}
    for name, weights in MIXTURES.items():
        for prompt in PROMPTS:
            inputs = model.tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
            ids = inputs["input_ids"]
            out = model.generate(
                ids, inputs["attention_mask"], mixture=weights, max_new_tokens=8, do_sample=False
            )
            text = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            expected[name, prompt] = text
    same = {pair: answers[pair].strip() == text.strip() for pair, text in expected.items()}
    assert all(same.values()), f"{sum(same.values())} of {len(same)}"
    assert all(answers["pico", p] == answers["dense", p] for p in PROMPTS)
    for prompt in PROMPTS[:5]:
        assert len({answers[name, prompt] for name in MIXTURES}) > 3


def test_a_blend_is_rounded_and_says_so(client):
    response = client.completions.with_raw_response.create(
        model="math=0.6,code=0.4", prompt="w1 w2", max_tokens=1
    )
    assert response.headers["x-mediator-mixture"] == "math=0.625,code=0.375"
    assert decision(response.parse())["mixture"] == {"math": 0.625, "code": 0.375}


@pytest.mark.parametrize("expert", served_pico.WORDS)
def test_each_request_is_answered_by_the_expert_of_its_words(client, expert):
    for prompt in served_pico.prompts(expert, 5, seed=2):
        routed = answer(client, "auto", prompt)
        assert max(decision(routed)["mixture"].items(), key=lambda pair: pair[1])[0] == expert
        assert decision(routed)["entropy"] >= 0
        assert routed.choices[0].text == answer(client, routed.model, prompt).choices[0].text


def test_a_conversation_keeps_the_expert_of_its_opening(client):
    messages = [{"role": "user", "content": served_pico.prompts("code", 1, seed=3)[0]}]
    chat = {"model": "auto", "max_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(messages=messages, **chat)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or "w1"},
        {"role": "user", "content": served_pico.prompts("math", 1, seed=3)[0]},
    ]
    second = client.chat.completions.create(messages=messages, **chat)
    assert first.model == second.model == "code"


def test_a_stream_is_routed_and_says_the_decision_first(client):
    messages = [{"role": "user", "content": served_pico.prompts("chat", 1)[0]}]
    options = {"max_tokens": 6, "temperature": 0, "messages": messages}
    chunks = list(client.chat.completions.create(model="auto", stream=True, **options))
    assert decision(chunks[0])["mixture"] == {"chat": 1.0}
    assert all("mediator" not in (chunk.model_extra or {}) for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(model="chat", **options)
    assert text == whole.choices[0].message.content


def test_responses_tools_and_log_probabilities_pass_through(client):
    prompt = served_pico.prompts("math", 1)[0]
    response = client.responses.create(
        model="auto", input=prompt, max_output_tokens=4, temperature=0
    )
    assert (response.model, decision(response)["mixture"]) == ("math", {"math": 1.0})
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        tools=[tool],
        tool_choice="none",
    )
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    several = answer(client, "auto", [prompt, prompt], n=2, logprobs=1, temperature=1)
    assert len(several.choices) == 4
    assert several.choices[0].logprobs.tokens


@pytest.mark.parametrize(
    ("name", "prompt", "error", "message"),
    [
        ("law", "w1", openai.NotFoundError, "law"),
        ("math=0.5,law=0.5", "w1", openai.NotFoundError, "unknown expert 'law'; this model has"),
        ("math=x", "w1", openai.BadRequestError, "must be a number, got 'x'"),
        ("math=-1", "w1", openai.BadRequestError, "at least 0, got -1"),
        ("math=inf", "w1", openai.BadRequestError, "must be finite"),
        ("math=0.01", "w1", openai.BadRequestError, "weights are rounded to multiples of 1/8"),
        ("auto", "", openai.BadRequestError, "no text to route by"),
        ("auto", [4, 9999], openai.BadRequestError, "token ids from 0 to 63 are required"),
        ("auto", "w1 " * 200, openai.BadRequestError, "maximum"),
    ],
)
def test_bad_requests_are_openai_errors_and_the_next_request_works(
    client, name, prompt, error, message
):
    with pytest.raises(error) as refusal:
        answer(client, name, prompt)
    assert message in refusal.value.body["message"]
    assert refusal.value.body["code"] == refusal.value.status_code
    assert answer(client, "math", "w1 w2").choices[0].text


def test_requests_without_the_key_are_refused_before_they_are_routed(address):
    stranger = openai.OpenAI(base_url=address, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        answer(stranger, "math=x", "w1")


def test_no_client_fills_the_engine_with_blends(client):
    for eighths in range(1, 8):
        answer(client, f"math={eighths / 8},chat={1 - eighths / 8}", "w1", max_tokens=1)
    assert len([m for m in client.models.list() if "=" in m.id]) <= 3
    first = answer(client, "math=0.125,chat=0.875", "w1 w2")  # it left, and comes back
    assert first.choices[0].text == answer(client, "math=0.125,chat=0.875", "w1 w2").choices[0].text


def test_files_of_a_blend_that_another_server_deleted_are_written_again(client, address):
    import shutil

    name = "math=0.5,chat=0.5"
    before = answer(client, name, "w1 w2").choices[0].text
    root = next(m for m in client.models.list() if m.id == name).root
    shutil.rmtree(root)
    assert answer(client, name, "w1 w2").choices[0].text == before
    assert os.path.isdir(root)
