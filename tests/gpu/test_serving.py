"""A routed model on the device: rows, generation, and where decoded experts stay."""

import pytest
import torch
from routed_pico import GREEDY, MIXTURES, build
from weight_pairs import same_bits

from mergekit_mediator import MediatorModel

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# By the form of experts: what a merge says, and how near answers are to those of the same experts elsewhere.
FORMS = {"exact": {"density": 0.3}, "bits": {"bits": 4}}
NEAR = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module", params=FORMS)
def root(request, make, tmp_path_factory):
    """An artifact in float32 in each form."""
    out = tmp_path_factory.mktemp("served") / "out"
    build(out, make(dtype=torch.float32), **FORMS[request.param])
    return out


@pytest.fixture
def there(root, device):
    """The artifact on the device."""
    model = MediatorModel.from_pretrained(root)
    model.model.to(device)
    return model


@pytest.fixture
def here(root):
    """The artifact on the processor."""
    return MediatorModel.from_pretrained(root)


def weights(model):
    return {name: weight.cpu().clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_expert_comes_back_bit_for_bit(device, dtype, make, tmp_path, read):
    family = make(dtype=dtype)
    model = build(tmp_path / "out", family, density=1.0)
    model.model.to(device)
    for name, path in family.experts.items():
        with model.mixture(name) as mixed:
            assert {weight.device.type for weight in mixed.state_dict().values()} == {device.type}
            found = weights(mixed)
        assert all(same_bits(found[n], weight) for n, weight in read(path).items())
    dense = read(tmp_path / "out")
    assert all(same_bits(weight, dense[n]) for n, weight in weights(model.model).items())


@pytest.mark.parametrize("apply", ["rows", "merge"])
def test_rows_have_the_answers_of_the_processor(there, here, device, batch, apply):
    placed = [part.to(device) for part in batch]
    found = there.forward(*placed, mixture=MIXTURES, apply=apply).logits
    assert found.device.type == device.type
    expected = here.forward(*batch, mixture=MIXTURES, apply=apply).logits
    real = batch[1].bool()
    torch.testing.assert_close(found.cpu()[real], expected[real], **NEAR)
    dense = there.forward(*placed, mixture="dense").logits.cpu()
    assert float((found.cpu() - dense)[0, -1].abs().max()) > 0.01


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_and_merge_agree_in_sixteen_bits(make, tmp_path, device, batch, dtype):
    model = build(tmp_path / "out", make(dtype=dtype), density=0.3)
    model.model.to(device)
    placed = [part.to(device) for part in batch]
    rows, merged = (
        model.forward(*placed, mixture=MIXTURES, apply=apply).logits[:, -1].float()
        for apply in ("rows", "merge")
    )
    torch.testing.assert_close(rows, merged, rtol=2**-4, atol=2**-4)


def test_generation_takes_tokens_from_anywhere(there, device, batch):
    told = there.generate(*batch, mixture=MIXTURES, **GREEDY)
    assert told.device.type == device.type
    placed = there.generate(*(part.to(device) for part in batch), mixture=MIXTURES, **GREEDY)
    assert torch.equal(told, placed)
    assert told.shape == (5, 9 + GREEDY["max_new_tokens"])


@pytest.mark.parametrize(
    ("residency", "options"),
    [(r, {}) for r in ("device", "cpu", "disk")] + [("cpu", {"expert_budget": 20_000})],
    ids=str,
)
def test_answers_do_not_depend_on_where_experts_stay(
    root, there, device, batch, residency, options
):
    other = MediatorModel.from_pretrained(root, residency=residency, **options)
    other.model.to(device)
    before, placed = weights(other.model), [part.to(device) for part in batch]
    for _ in range(2):  # experts come from their files, then from where they stay
        for mixture in ("math", "code", {"math": 0.3, "chat": 0.7}):
            found, expected = (
                model.forward(*placed, mixture=mixture, apply="merge").logits
                for model in (other, there)
            )
            assert torch.equal(found, expected)
    kept = list(other._mixer.experts._decoded.values())
    assert bool(kept) == (residency != "disk")
    if residency == "cpu":
        assert {stored.positions.device.type for stored in kept} == {"cpu"}
        pinned = [s.codes.is_pinned() for s in kept if s.codes.numel()]
        assert all(pinned) == (device.type == "cuda") or not pinned
    after = weights(other.model)
    assert all(same_bits(before[name], after[name]) for name in before)


def test_a_model_that_is_loaded_onto_the_device_answers_the_same(root, there, device, batch):
    model = MediatorModel.from_pretrained(root, device_map=str(device))
    assert {weight.device.type for weight in model.model.parameters()} == {device.type}
    placed = [part.to(device) for part in batch]
    found, expected = (m.forward(*placed, mixture=MIXTURES).logits for m in (model, there))
    torch.testing.assert_close(found, expected, **NEAR)


def test_a_model_that_moves_inside_a_mixture_has_its_dense_weights_afterwards(root, device, read):
    model = MediatorModel.from_pretrained(root)
    with model.mixture({"math": 0.5, "code": 0.5}) as mixed:
        mixed.to(device)
    found, dense = weights(model.model), read(root)
    assert {weight.device.type for weight in model.model.parameters()} == {device.type}
    assert all(same_bits(found[name], weight) for name, weight in dense.items())
