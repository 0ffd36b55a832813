from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_mediator.delta.kept import lost_of_left_out
from mergekit_mediator.export.adapter import Adapter, Factors, blend, read_peft, write_peft
from mergekit_mediator.export.auto_rank import least_rank, predicted_part
from mergekit_mediator.export.low_rank import LowRank, squared_norm


@pytest.fixture
def adapter():
    """One module of rank 96 whose singular values fall slowly, of weights a thousand times its squared norm."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 128, 96, generator=generator) * torch.logspace(0, -1, 96)
    norm = squared_norm(left, right)
    modules = {"model.layers.0.mlp.up_proj": Factors("linear", LowRank(left, right, norm, 0.0))}
    return Adapter(modules, base_square=1000 * norm)


@pytest.mark.parametrize("over_base", [1e-5, 1e-3, 1e-2])
def test_what_a_rank_keeps_is_predicted_from_the_change_beside_the_base(adapter, over_base):
    changed = replace(adapter, base_square=adapter.squared_norm / over_base)
    chosen = least_rank(changed, 0.9)
    left = chosen.squared_error
    assert chosen.change_over_base == pytest.approx(over_base)
    assert predicted_part(chosen) == pytest.approx(1 - float(lost_of_left_out(left, over_base)))
    assert predicted_part(chosen) == pytest.approx(chosen.choice.kept, abs=1e-6)


def test_a_larger_change_takes_a_larger_rank(adapter):
    ranks = [
        least_rank(replace(adapter, base_square=adapter.squared_norm / over_base), 0.99).choice.rank
        for over_base in (1e-5, 1e-2)
    ]
    assert ranks[0] < ranks[1]


def test_the_weights_that_an_adapter_changes_are_measured_by_its_file(adapter, tmp_path):
    write_peft(adapter, tmp_path / "a", "base", torch.float32)
    assert read_peft(tmp_path / "a").change_over_base == pytest.approx(1e-3)
    assert blend([(0.5, adapter), (0.5, adapter)], 64).base_square == adapter.base_square


def test_an_adapter_of_an_earlier_version_tells_nothing_of_its_base(adapter, tmp_path):
    write_peft(adapter, tmp_path / "a", "base", torch.float32)
    path = tmp_path / "a" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    told = metadata["mergekit_mediator"].replace(f', "base_square": {adapter.base_square!r}', "")
    assert told != metadata["mergekit_mediator"]
    save_file(tensors, path, metadata={**metadata, "mergekit_mediator": told})
    assert read_peft(tmp_path / "a").change_over_base == 0
