"""Every way in is routed: the tools that people already use, on a pico model whose experts differ."""

import json
import socket
import threading
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ArtifactError

GREEDY = {"max_new_tokens": 6, "do_sample": False}
QUESTION = "w3 w41 w5 w9"


@pytest.fixture(scope="module")
def out(make, tmp_path_factory):
    """An artifact written by the stock command's own function."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    directory = tmp_path_factory.mktemp("ways") / "out"
    config = make(dtype=torch.float32).config(route="all", density=1.0)
    run(MergeConfiguration.model_validate(config), str(directory), MergeOptions(quiet=True))
    return directory


@pytest.fixture(scope="module")
def mediator(out):
    return MediatorModel.from_pretrained(out)


@pytest.fixture(scope="module")
def answers(mediator):
    """The answer to the question by the routed expert, which is not the dense expert's."""
    ids, mask = mediator.tokenize([QUESTION])
    best = mediator.experts[int(mediator.route(ids, mask).weights.argmax())]

    def text(mixture):
        tokens = mediator.generate(ids, mask, mixture=mixture, **GREEDY)[0, ids.shape[1] :]
        return mediator.tokenizer.decode(tokens, skip_special_tokens=True)

    routed, dense = text(best), text("dense")
    assert routed != dense
    return routed, dense


@pytest.fixture(scope="module")
def routed(out):
    return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_remote_code_gives_the_routed_model(routed, mediator, answers):
    ids, mask = mediator.tokenize([QUESTION])
    tokens = routed.generate(ids, attention_mask=mask, **GREEDY)[0, ids.shape[1] :]
    assert mediator.tokenizer.decode(tokens, skip_special_tokens=True) == answers[0]
    torch.testing.assert_close(routed(ids, mask).logits, mediator.forward(ids, mask).logits)


def test_without_remote_code_it_is_the_dense_expert(out, mediator, answers):
    dense = AutoModelForCausalLM.from_pretrained(out)
    ids, mask = mediator.tokenize([QUESTION])
    tokens = dense.generate(ids, attention_mask=mask, **GREEDY)[0, ids.shape[1] :]
    assert mediator.tokenizer.decode(tokens, skip_special_tokens=True) == answers[1]
    assert not hasattr(dense, "mediator")


def test_a_routed_model_is_saved_as_its_stock_class(routed, tmp_path):
    routed.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert not (tmp_path / "mediator").exists()


def test_the_pipeline_is_routed(out, answers):
    messages = [{"role": "user", "content": QUESTION}]
    for remote, expected in ((True, answers[0]), (False, answers[1])):
        generate = pipeline("text-generation", model=str(out), trust_remote_code=remote)
        result = generate(messages, return_full_text=False, **GREEDY)
        assert result[0]["generated_text"].strip() == expected


def test_text_is_streamed_from_another_thread(routed, mediator, answers):
    ids, mask = mediator.tokenize([QUESTION])
    streamer = TextIteratorStreamer(
        mediator.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    options = {"attention_mask": mask, "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=routed.generate, args=(ids,), kwargs=options)
    thread.start()
    assert "".join(streamer).strip() == answers[0]
    thread.join()


def test_lm_eval_scores_and_generates_with_the_experts(out, mediator, answers):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def requests(kind, *arguments):
        return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]

    pairs = [(QUESTION, " w7 w8"), ("w20 w21", " w7 w8")]
    scores = {}
    for remote in (True, False):
        model = HFLM(
            pretrained=str(out), trust_remote_code=remote, device="cpu", batch_size=2, dtype="auto"
        )
        scores[remote] = [s for s, _ in model.loglikelihood(requests("loglikelihood", *pairs))]
        prompt = mediator.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
        )
        options = {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}
        (text,) = model.generate_until(requests("generate_until", (prompt, options)))
        assert text.strip() == answers[0 if remote else 1]
    for score, (context, continuation) in zip(scores[True], pairs, strict=True):
        ids = mediator.tokenizer(context + continuation, return_tensors="pt").input_ids
        logits = mediator.forward(ids[:, :-1]).logits.log_softmax(-1)[0]
        expected = logits[-2:].gather(1, ids[0, -2:, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-3)
    assert scores[True] != pytest.approx(scores[False], abs=1e-2)


def test_transformers_serve_is_routed(out, answers):
    from transformers.cli.serve import Serve

    body = {
        "model": str(out),
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 6,
        "temperature": 0.0,
        "stream": False,
    }
    for remote, expected in ((True, answers[0]), (False, answers[1])):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        server = Serve(port=port, non_blocking=True, device="cpu", trust_remote_code=remote)
        try:
            while not getattr(server.server, "started", False):
                time.sleep(0.02)
            request = urllib.request.Request(
                f"http://localhost:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
            assert answer.strip() == expected
        finally:
            server.kill_server()


def test_remote_code_of_something_that_is_no_artifact_is_refused(out, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(ArtifactError, match="is not a mediator artifact"):
        MediatorModel.attach(model, tmp_path)
