"""llama.cpp's server answers as experts and blends, after the command that `export` prints, alone and routed."""

import asyncio
import shlex

import httpx
import openai
import pytest
import torch
import vllm_server
from byte_level import llama, qwen3, with_tokenizer
from commands import figures
from families import make_family
from local_servers import running
from real_llama_cpp import distance, predicted, serving

from mergekit_mediator import MediatorModel
from mergekit_mediator.engines.deciders import choose_decider
from mergekit_mediator.engines.gateway import gateway_app
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.models.prompts import render
from mergekit_mediator.store.manifest import read_manifest

DEMO = vllm_server.ROOT / "demo/mediator"
PROMPTS = (
    "What is 12 + 30?",
    "Reverse this list of words: sun, sea, sky",
    "Count the letter e in: deep sea",
)
ORDER = ("math", "code", "chat")


def start_command(out, folder, *options):
    """The command that `export` prints, in words."""
    (line,) = figures("export", out, folder, "--format", "llama.cpp", *options)[
        "command"
    ].splitlines()
    return shlex.split(line)


def scales(names, weights):
    return [{"id": n, "scale": weights.get(name, 0.0)} for n, name in enumerate(names)]


def mixtures(names):
    """The dense expert, every expert alone, a blend of two, and a part of one."""
    first, second = names[:2]
    blends = [{first: 0.6, second: 0.4}, {second: 0.5}]
    return [{}, *({name: 1.0} for name in names), *blends]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def small(request, tmp_path_factory):
    """A pico artifact of three adapters in float32, and the server's address."""
    import served_pico
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp(request.param)
    make = {"llama": llama, "qwen3": lambda: qwen3(tied=False)}[request.param]
    family = with_tokenizer(make_family(root / "family", make, dtype=torch.float32, experts=()))
    config = MergeConfiguration.model_validate(served_pico.config(family, root))
    run(config, str(root / "out"), MergeOptions(quiet=True, lora_merge_cache=str(root / "cache")))
    with serving(start_command(root / "out", root / "files"), root / "log") as address:
        yield MediatorModel.from_pretrained(root / "out", dtype="float32"), address


def test_experts_and_blends_are_those_of_the_routed_model(small):
    model, address = small
    worst = 0.0
    for weights in mixtures(ORDER):
        with model.mixture(weights or "dense") as mixed:
            for text in PROMPTS:
                ids = model.tokenizer(text)["input_ids"]
                # every prompt is asked under all mixtures, so the server must forget what it cached for the last one
                worst = max(worst, distance(mixed, ids, address, scales(ORDER, weights)))
    print(f"log-probabilities differ by {worst:.4f} at most")
    assert worst < 0.02  # keys and values are float16 in llama.cpp's cache


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a routed model, and the server's address."""
    folder = tmp_path_factory.mktemp("demo")
    with serving(start_command(DEMO, folder / "files"), folder / "log") as address:
        yield MediatorModel.from_pretrained(DEMO, dtype="float32"), address


def greedy(model, ids, weights, count=8):
    inputs = torch.tensor([ids])
    settings = {"max_new_tokens": count, "do_sample": False}
    out = model.generate(inputs, torch.ones_like(inputs), mixture=weights or "dense", **settings)
    return model.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_the_demo_answers_as_the_routed_model_does(demo):
    model, address = demo
    same = []
    for weights in mixtures(model.experts):
        for prompt in PROMPTS:
            ids = render(model.tokenizer, prompt)
            answer = predicted(address, ids, scales(model.experts, weights))
            same.append(answer["content"].strip() == greedy(model, ids, weights))
    print(f"{sum(same)} of {len(same)} answers are the same")
    # weights and activations are bfloat16 there, so that a near tie may turn out otherwise
    assert sum(same) >= 0.9 * len(same), same


def test_the_gateway_routes_each_chat_to_its_expert(demo):
    model, address = demo
    decider = choose_decider(DEMO, read_manifest(DEMO), "auto")
    app = gateway_app(model.experts, decider, ServiceSettings(say=("header", "body")), (address,))
    with running(app) as front:
        client = openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0)
        assert {m.id for m in client.models.list()} >= {*model.experts, "auto"}
        for prompt in PROMPTS:
            chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
            routed = client.chat.completions.create(model="auto", temperature=0, **chat)
            weights = routed.model_extra["mediator"]["mixture"]
            decision = asyncio.run(decider.decide([prompt], "prompt"))
            likeliest = model.experts[int(decision.weights[0].argmax())]
            assert likeliest == max(weights, key=weights.get)
            ids = render(model.tokenizer, prompt)
            direct = predicted(address, ids, scales(model.experts, weights))
            assert routed.choices[0].message.content.strip() == direct["content"].strip()
            named = client.chat.completions.create(model=likeliest, temperature=0, **chat)
            alone = predicted(address, ids, scales(model.experts, {likeliest: 1.0}))
            assert named.choices[0].message.content.strip() == alone["content"].strip()


def test_a_stream_brings_the_decision_and_a_blend_by_name(demo):
    model, address = demo
    blend = f"{model.experts[0]}=0.5,{model.experts[1]}=0.5"
    decider = choose_decider(DEMO, read_manifest(DEMO), "auto")
    with running(gateway_app(model.experts, decider, ServiceSettings(), (address,))) as front:
        client = openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0)
        chat = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 8}
        chunks = list(client.chat.completions.create(model=blend, stream=True, **chat))
        assert chunks[0].model_extra["mediator"]["mixture"] == dict.fromkeys(model.experts[:2], 0.5)
        response = httpx.post(f"{front}/v1/chat/completions", json={"model": "law=1", **chat})
        assert response.status_code == 404
