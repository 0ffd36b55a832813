"""Experts in vLLM's weights, through vLLM's own patches.

On processors vLLM packs its weights, so that no running engine can be changed there; the patches are written
through vLLM's function into a model that keeps its contract: `load_weights` with names and whole tensors.
"""

import subprocess

import pytest
import torch
import vllm_server
from safetensors.torch import load_file

from mergekit_mediator import MediatorModel

PROGRAM = """
import sys
from types import SimpleNamespace
import torch
from safetensors.torch import save_file
from mergekit_mediator.engines.vllm_weights import ExpertWeights
from mergekit_mediator.errors import EngineError
from mergekit_mediator.models.loading import load_plain

out, expert, before, inside, after = sys.argv[1:]

class Model:
    def __init__(self):
        self.plain = load_plain(out)
    def parameters(self):
        return self.plain.parameters()
    def load_weights(self, weights):
        own = dict(self.plain.named_parameters())
        for name, weight in weights:
            own[name].data.copy_(weight)
        return {name for name, _ in weights}

class Worker(ExpertWeights):
    def __init__(self):
        self.model_runner = SimpleNamespace(model=Model())
    def save(self, path):
        state = self.model_runner.model.plain.state_dict()
        save_file({name: weight.clone() for name, weight in state.items()}, path)

worker = Worker()
worker.save(before)
print(worker.enter_expert(out, expert))
try:
    worker.enter_expert(out, expert)
except EngineError as error:
    print(error)
worker.save(inside)
print(worker.leave_expert())
worker.save(after)
packed = worker.model_runner.model.plain.model.layers[0].mlp.down_proj
packed.weight = torch.nn.Parameter(torch.empty(0))
try:
    worker.enter_expert(out, expert)
except EngineError as error:
    print(error)
"""


@pytest.mark.parametrize("form", [{"density": 0.3}, {"bits": 1.0}], ids=str)
def test_an_expert_enters_as_it_is_stored_and_leaves_bit_for_bit(family, merged, tmp_path, form):
    out = merged(family.config(route="all", **form))
    files = [str(tmp_path / f"{name}.safetensors") for name in ("before", "inside", "after")]
    result = subprocess.run(
        [vllm_server.PYTHON, "-c", PROGRAM, str(out), "code", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    count, twice, left, packed = result.stdout.strip().splitlines()[-4:]
    assert count == left
    assert int(count) > 20
    assert twice == "an expert is in place: leave it first"
    assert "has packed its weights" in packed
    before, inside, after = (load_file(file) for file in files)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with MediatorModel.from_pretrained(out).mixture("code") as served:
        expected = served.state_dict()
        assert all(torch.equal(inside[name], expected[name]) for name in inside)
    assert any(not torch.equal(inside[name], before[name]) for name in before)
