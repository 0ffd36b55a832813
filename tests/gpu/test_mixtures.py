"""Mixtures are put into weights on the device as on the processor, and leave no trace there."""

import random

import pytest
import torch
from torch import nn
from weight_pairs import bits, same_bits

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.mixing import mix_, restore_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.residency import Experts
from mergekit_mediator.store.expert_file import ExpertFile, ExpertWriter

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FORMS = ("exact", "int8", "int4", "sign", "steps", "adapter")
every_form = pytest.mark.parametrize("form", FORMS)
SHAPE = (48, 64)


def pair(dtype, seed=0, shape=SHAPE):
    """An expert and a dense expert with equal coordinates and zeros of both signs."""
    generator = torch.Generator().manual_seed(7)
    dense = torch.randn(shape, generator=generator).to(dtype)
    dense.view(-1)[::9] = -0.0
    change = 0.1 * torch.randn(shape, generator=generator.manual_seed(100 + seed))
    change.view(-1)[::5] = 0
    expert = (dense.float() + change).to(dtype)
    expert.view(-1)[::18] = 0.0
    return expert, dense


def stored(form, dtype, seed=0, shape=SHAPE):
    expert, dense = pair(dtype, seed, shape)
    if form == "steps":
        return approximate(expert.float() - dense.float(), 1e-4, dtype, share=0.5)
    if form == "adapter":
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(n, 3, generator=generator) / 9 for n in shape)
        factors = Factors(left.to(dtype), right.to(dtype), torch.full((3,), 2.0))
        return StoredWeight.of_factors(shape, dtype, factors)
    return encode(expert, dense, 0.5, form)


@every_dtype
def test_exact_experts_come_back_bit_for_bit(device, dtype):
    for seed in range(3):
        expert, dense = pair(dtype, seed)
        weight = dense.to(device)
        saved = mix_(weight, [(1.0, encode(expert, dense, 1.0).to(device))])
        assert same_bits(weight.cpu(), expert)
        restore_(weight, saved)
        assert same_bits(weight.cpu(), dense)


@every_dtype
@every_form
@pytest.mark.parametrize("coefficients", [(1.0,), (0.7,), (0.4, 0.9)], ids=str)
@pytest.mark.parametrize("fast", [False, True], ids=["full", "tf32"])
def test_a_mixture_is_that_of_the_processor(device, tf32, dtype, form, coefficients, fast):
    _, dense = pair(dtype)
    parts = [(c, stored(form, dtype, seed)) for seed, c in enumerate(coefficients)]
    expected = dense.clone()
    mix_(expected, parts)
    tf32(fast)
    weight = dense.to(device)
    saved = mix_(weight, [(c, part.to(device)) for c, part in parts])
    limit = torch.finfo(dtype).eps  # one place of rounding, and that of a factor
    torch.testing.assert_close(weight.cpu(), expected, rtol=2 * limit, atol=4 * limit)
    restore_(weight, saved)
    assert same_bits(weight.cpu(), dense)


@every_dtype
def test_forms_are_mixed_with_each_other(device, dtype):
    _, dense = pair(dtype)
    parts = [(0.2 * (i + 1), stored(form, dtype, i)) for i, form in enumerate(FORMS)]
    expected, weight = dense.clone(), dense.to(device)
    mix_(expected, parts)
    saved = mix_(weight, [(c, part.to(device)) for c, part in parts])
    limit = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.cpu(), expected, rtol=2 * limit, atol=4 * limit)
    restore_(weight, saved)
    assert same_bits(weight.cpu(), dense)


@every_form
def test_mixing_twice_gives_the_same_bits(device, form):
    _, dense = pair(torch.float32)
    parts = [(c, stored(form, torch.float32, seed).to(device)) for seed, c in enumerate((0.3, 0.8))]
    weights = [dense.to(device) for _ in range(2)]
    for weight in weights:
        mix_(weight, parts)
    assert same_bits(*weights)


class Net(nn.Module):
    """Two layers in bfloat16."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(24, 16, bias=False, dtype=torch.bfloat16)
        self.two = nn.Linear(16, 12, bias=False, dtype=torch.bfloat16)
        for layer in (self.one, self.two):
            layer.weight.data = pair(torch.bfloat16, shape=layer.weight.shape)[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An expert of `Net` in each form."""
    root, dense = tmp_path_factory.mktemp("experts"), Net().state_dict()
    for seed, form in enumerate(FORMS):
        writer = ExpertWriter(root / f"{form}.safetensors", form)
        for name, weight in dense.items():
            writer.write(name, stored(form, weight.dtype, seed, tuple(weight.shape)), weight)
        writer.close()
    return {form: ExpertFile(root / f"{form}.safetensors") for form in FORMS}


def test_ten_thousand_mixtures_leave_no_flipped_bit(device, files):
    dense = Net().state_dict()
    model = Net().to(device)
    mixer = Mixer(model, Experts(files, dense.__getitem__))
    draw, changed = random.Random(0), 0
    for step in range(10_000):
        chosen = draw.sample(FORMS, draw.randint(1, 2))
        with mixer.mixture({name: draw.choice([0.2, 1.0, 1.7]) for name in chosen}):
            if step % 1000 == 0:
                changed += not same_bits(model.one.weight.data.cpu(), dense["one.weight"])
    assert changed == 10
    after = model.state_dict()
    assert all(torch.equal(bits(after[name].cpu()), bits(dense[name])) for name in dense)


@every_form
def test_an_expert_that_enters_again_has_the_same_bits(device, files, form):
    model = Net().to(device)
    mixer = Mixer(model, Experts(files, Net().state_dict().__getitem__))
    entered = []
    for _ in range(3):
        with mixer.mixture({form: 1.0}):
            entered.append(model.one.weight.detach().clone())
    assert all(same_bits(entered[0].cpu(), weight.cpu()) for weight in entered)
