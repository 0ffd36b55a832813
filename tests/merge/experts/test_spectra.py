import pytest
import torch

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.tradeoff import tradeoff
from mergekit_mediator.merge.experts import spectra as module
from mergekit_mediator.merge.experts.spectra import SPECTRA, spectra_in
from mergekit_mediator.store.codec import encode_bytes
from mergekit_mediator.store.manifest import files_below


def task_vector(out, width, rank=5):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(out, rank, generator=generator)
    right = torch.randn(rank, width, generator=generator)
    return 1e-3 * left @ right + 1e-3 * torch.randn(out, width, generator=generator)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1700, 1600)])
@pytest.mark.parametrize("slope", [1e-6, 1e-8])
def test_components_from_disk_give_the_same_bytes(tmp_path, shape, slope):
    tau = task_vector(*shape)
    with spectra_in(tmp_path) as spectra:
        found = spectra.decompose("math", "w", tau)
        read = spectra.read("math", "w")
    assert torch.equal(tradeoff(tau), tradeoff(tau, found))
    direct, again = (
        encode_bytes(approximate(tau, slope, torch.bfloat16, components=c))[0] for c in (None, read)
    )
    assert torch.equal(direct, again)


def test_vectors_have_no_components(tmp_path):
    with spectra_in(tmp_path) as spectra:
        assert spectra.decompose("math", "norm", torch.randn(100)) is None
        assert spectra.read("math", "norm") is None


@pytest.mark.parametrize("storage", [{"route": "all", "bits": 2}, {"budget": "3x"}])
def test_a_merge_decomposes_each_weight_once(family, merged, monkeypatch, storage):
    calls = []
    original = module.decompose

    def counting(matrix):
        calls.append(matrix.shape)
        return original(matrix)

    def never(matrix):
        raise AssertionError("a weight is decomposed again")

    monkeypatch.setattr(module, "decompose", counting)
    monkeypatch.setattr("mergekit_mediator.delta.approximate.decompose", never)
    monkeypatch.setattr("mergekit_mediator.delta.tradeoff.decompose", never)
    out = merged(family.config(**storage))
    assert calls
    assert len(calls) % len(family.experts) == 0
    assert not any(name.startswith(SPECTRA) for name in files_below(out))
