"""The registered methods where mergekit merges in memory, and `mediator_dense` as an ordinary merge."""

import mergekit.merge_methods
import pytest
import torch

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge import plugin

plugin.install()


def models(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(5, 4, generator=generator)} for _ in range(count)]


def test_the_dense_method_merges_state_dicts_in_memory():
    base, first, second = models()
    merged = mergekit.merge_methods.merge_state_dicts(
        {"base": base, "a": first, "b": second},
        "mediator_dense",
        base="base",
        parameters={"weight": {"a": 1.0, "b": 3.0}, "lambda": 0.5},
    )
    mean = 0.25 * (first["w"] - base["w"]) + 0.75 * (second["w"] - base["w"])
    torch.testing.assert_close(merged["w"], base["w"] + 0.5 * mean)


def test_the_dense_method_refuses_weights_that_sum_to_zero():
    base, first = models(2)
    with pytest.raises(ConfigError, match=r"weight: a sum above 0 .* got 0\.0 for w: raise"):
        mergekit.merge_methods.merge_state_dicts(
            {"base": base, "a": first}, "mediator_dense", base="base", parameters={"weight": 0.0}
        )


def test_the_dense_method_writes_the_dense_expert_as_an_ordinary_merge(family, merged, read):
    config = family.config("mediator_dense", weight=1.0)
    plain = merged(config)
    assert not (plain / "mediator").exists()
    dense, expected = read(plain), read(merged(family.config(route="none"), name="artifact"))
    assert all(torch.equal(dense[name], expected[name]) for name in expected)


def test_in_memory_the_full_method_gives_the_dense_expert_and_says_so(caplog):
    base, first, second = models()
    inputs = {"base": base, "a": first, "b": second}
    parameters = {"weight": {"a": 1.0, "b": 3.0}, "lambda": 0.5}
    merge = mergekit.merge_methods.merge_state_dicts
    merged = merge(inputs, "mediator", base="base", parameters={**parameters, "density": 0.2})
    assert caplog.messages == [
        "merge_method mediator: a merge in memory returns the dense expert alone, as mediator_dense does: "
        "to write experts, use mergekit-yaml, mergekit-mediator merge or mergekit.merge.run_merge"
    ]
    dense = merge(inputs, "mediator_dense", base="base", parameters=parameters)
    assert torch.equal(merged["w"], dense["w"])
