"""An expert enters the weights of a running vLLM engine and leaves them, for offline batches.

On processors vLLM packs its weights, and nothing can change them afterwards. The engine of this test runs without
oneDNN, so that its linear layers keep their weights; all else is vLLM's own.
"""

import json
import os
import subprocess

import pytest
import served_pico
import torch
import vllm_server

from mergekit_mediator import MediatorModel

PROGRAM = """
import json, sys
import vllm._custom_ops
packs = sys.argv[1] == "packed"
vllm._custom_ops._supports_onednn = packs
from vllm import LLM, SamplingParams

def main():
    out, prompts = sys.argv[2], json.loads(sys.argv[3])
    extension = "mergekit_mediator.engines.vllm_weights.ExpertWeights"
    llm = LLM(out, dtype="float32", enforce_eager=True, max_model_len=128, worker_extension_cls=extension)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    def answers():
        llm.reset_prefix_cache()
        return [o.outputs[0].text.strip() for o in llm.generate(prompts, greedy, use_tqdm=False)]
    texts = {"before": answers()}
    for name in ("math", "code"):
        try:
            llm.collective_rpc("enter_expert", args=(out, name))
        except Exception as error:
            print(json.dumps({"refused": str(error)}))
            return
        texts[name] = answers()
        llm.collective_rpc("leave_expert")
    texts["after"] = answers()
    print(json.dumps(texts))

if __name__ == "__main__":
    main()
"""
PROMPTS = [p for name in served_pico.WORDS for p in served_pico.prompts(name, 4, seed=5)]


def engine(weights, out):
    """The answers of an engine in one process of its own, whose weights are `packed` or `plain`."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the engine is another process, which packs
        "VLLM_PLUGINS": "none",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [vllm_server.PYTHON, "-c", PROGRAM, weights, str(out), json.dumps(PROMPTS)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def expected(model, mixture):
    """The greedy answers of the routed model under a mixture."""
    texts = []
    for prompt in PROMPTS:
        inputs = model.tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = model.generate(ids, mask, mixture=mixture, max_new_tokens=8, do_sample=False)
        answer = out[0, ids.shape[1] :]
        texts.append(model.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return texts


@pytest.fixture
def out(make, merged):
    """Full fine-tunes, whose norms change too."""
    family = make(served_pico.wide_llama, dtype=torch.float32)
    return merged(family.config(route="all", bits=2.0))


def test_an_engine_answers_as_the_expert_that_entered_and_as_before_when_it_left(out):
    answers = engine("plain", out)
    model = MediatorModel.from_pretrained(out, dtype="float32")
    assert answers["before"] == answers["after"] == expected(model, {})
    for name in ("math", "code"):
        assert answers[name] == expected(model, name)
        assert answers[name] != answers["before"]


def test_an_engine_that_has_packed_its_weights_refuses(out):
    assert "has packed its weights" in engine("packed", out)["refused"]
