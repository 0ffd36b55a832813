import pytest
import torch
from adapters import train

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.weight_patch import weight_patches

FORMS = [
    {"density": 0.3},
    {"density": 1.0},
    {"bits": 1.0},
    {"density": 0.2, "values": "int4"},
    {"density": 0.2, "values": "random_sign"},
]


def patched(out, mixture, dtype):
    """The dense expert's weights after a mixture's patches, and after they were undone."""
    experts = StoredExperts(out)
    dense = {name: experts.dense.weight(name).to(dtype) for name in experts.weights}
    mixed = {name: weight.clone() for name, weight in dense.items()}
    for patch in weight_patches(experts, mixture):
        flat = mixed[patch.weight].view(-1)
        assert torch.equal(flat[patch.positions], patch.dense)
        flat[patch.positions] = patch.values
    again = {name: weight.clone() for name, weight in mixed.items()}
    for patch in weight_patches(experts, mixture):
        again[patch.weight].view(-1)[patch.positions] = patch.dense
    return dense, mixed, again


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mixture", [{"math": 1.0}, {"code": 0.25, "chat": 0.75}], ids=str)
def test_patches_are_what_is_served_bit_for_bit_and_are_undone(family, merged, form, mixture):
    out = merged(family.config(route="all", **form))
    dense, mixed, again = patched(out, mixture, torch.bfloat16)
    model = MediatorModel.from_pretrained(out)
    with model.mixture(mixture) as served:
        state = {name: weight.clone() for name, weight in served.state_dict().items()}
    changed = [name for name in dense if not torch.equal(dense[name], mixed[name])]
    assert len(changed) > 20
    assert all(torch.equal(mixed[name], state[name]) for name in dense)
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def test_adapters_are_patched_as_they_are_served(make, merged, tmp_path):
    family = make(dtype=torch.float32)
    models = []
    for seed, name in enumerate("ab"):
        train(family.base, tmp_path / name, seed)
        entry = {"model": f"{family.base}+{tmp_path / name}", "parameters": {"expert": name}}
        models.append(entry)
    out = merged({"merge_method": "mediator", "base_model": str(family.base), "models": models})
    _, mixed, _ = patched(out, {"a": 1.0}, torch.float32)
    model = MediatorModel.from_pretrained(out)
    with model.mixture("a") as served:
        state = served.state_dict()
        for name, weight in mixed.items():
            torch.testing.assert_close(weight, state[name])


def test_an_unknown_expert_is_refused(family, merged):
    experts = StoredExperts(merged(family.config(route="all", density=0.3)))
    with pytest.raises(ExportError, match="unknown expert 'law'"):
        list(weight_patches(experts, {"law": 1.0}))
