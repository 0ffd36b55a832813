"""The kernels of rows compute what torch's own products do, and serve whole models."""

import pytest
import torch
from routed_pico import GREEDY, build
from torch import nn
from weight_pairs import same_bits

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.serve import row_modules, sparse_rows
from mergekit_mediator.serve.row_modules import Part, Place, kind_of, sparse_matrix
from mergekit_mediator.serve.sparse_rows import SparseRows

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SMALL = (48, 64)
SHAPES = [SMALL, (1024, 700), (130, 40_000)]
# Decomposing a large matrix for `steps` would take most of the tests' time, and the kernels see no factors.
CASES = [*((form, shape) for form in ("exact", "adapter") for shape in SHAPES), ("steps", SMALL)]
# By expert, the coefficient for each row: rows of one expert, a blend, a row of none, and an expert of no row.
NUMBERS = [[1.0, 0.0, 0.3, 0.0, 1.0], [0.0, 1.0, 0.7, 0.0, -0.5], [0.0] * 5, [0.0, 0.0, 1.3, 0, 0]]
MIXTURES = ["math", "code", {"math": 0.3, "chat": 0.7}, "dense", "math"]
FORMS = {"exact": {"density": 0.1}, "bits": {"bits": 4}}


@pytest.fixture
def kernels(cuda):
    """The device. Where Triton is installed, the kernels must serve: they would give way to torch in silence."""
    pytest.importorskip("triton", reason="Triton is not installed: torch's own products serve")
    assert sparse_rows.served(torch.zeros(1, 1, device=cuda))
    return cuda


@pytest.fixture
def plain(monkeypatch):
    """Switches the kernels off."""
    return lambda: monkeypatch.setattr(row_modules, "served", lambda weight: False)


def stored(form, dense, seed, density):
    generator = torch.Generator().manual_seed(seed)
    change = 0.1 * torch.randn(dense.shape, generator=generator)
    change[dense.shape[0] // 2] = 0  # a row without values
    if form == "exact":
        return encode((dense.float() + change).to(dense.dtype), dense, density, form)
    if form == "adapter":
        left, right = (torch.randn(n, 3, generator=generator) / 9 for n in dense.shape)
        factors = Factors(left.to(dense.dtype), right.to(dense.dtype), torch.full((3,), 2.0))
        return StoredWeight.of_factors(tuple(dense.shape), dense.dtype, factors)
    change[torch.rand(change.shape, generator=generator) > density] = 0
    return approximate(change, 1e-4, dense.dtype, share=0.0)


def run(module, parts, x, batch):
    """The module's output with the hook of the parts."""
    place = Place(module, "weight")
    hook = kind_of(place)(place, module.weight.data, parts, batch)
    return hook.function(module, (x,), module(x))


@every_dtype
@pytest.mark.parametrize(("form", "shape"), CASES, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.3])
@torch.no_grad()
def test_rows_are_those_of_dense_changes(kernels, dtype, form, shape, density):
    module = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    kept = [stored(form, module.weight.data, seed, density) for seed in range(len(NUMBERS))]
    module.to(kernels)
    weight = module.weight.data
    parts = []
    for one, numbers in zip(kept, NUMBERS, strict=True):
        one = one.to(kernels)
        parts.append(
            Part(
                one,
                numbers,
                torch.tensor(numbers, device=kernels),
                lambda one=one: sparse_matrix(weight, one),
            )
        )
    if form == "exact":
        assert all(isinstance(part.matrix(), SparseRows) for part in parts)
    for group, length in ((1, 1), (3, 1), (1, 3), (2, 9)):  # decoding, beams, and a prefill
        x = torch.randn(5 * group, length, shape[1], device=kernels).to(dtype)
        expected = module(x).double()
        for part in parts:
            for row, number in enumerate(part.numbers):
                rows = slice(row * group, (row + 1) * group)
                expected[rows] += number * (
                    x[rows].double() @ part.stored.change(weight).double().T
                )
        found = run(module, parts, x, 5)
        limit = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
        size = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * size)
        assert same_bits(found, run(module, parts, x, 5))


@every_dtype
def test_a_matrix_is_filled_in_blocks_of_rows(kernels, dtype, monkeypatch):
    weight = torch.zeros(1024, 700, dtype=dtype, device=kernels)
    positions = torch.rand(weight.numel(), device=kernels).lt(0.1).nonzero()[:, 0]
    values = torch.randn(positions.numel(), device=kernels)
    expected = torch.zeros(weight.numel(), device=kernels).index_copy_(0, positions, values)
    monkeypatch.setattr(sparse_rows, "_DENSE_NUMBERS", 700 * 100)
    blocks = list(SparseRows.of(weight, positions, values).dense())
    assert len(blocks) == 11
    limit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        torch.cat(blocks).float().view(-1), expected, rtol=limit, atol=limit / 100
    )


@pytest.fixture(scope="module", params=FORMS)
def root(request, make, tmp_path_factory):
    """An artifact in float32 in each form."""
    out = tmp_path_factory.mktemp("sparse_rows") / "out"
    build(out, make(dtype=torch.float32), **FORMS[request.param])
    return out


@pytest.mark.parametrize("length", [1, 6, 20])
@torch.no_grad()
def test_a_mixed_batch_is_answered_as_one_mixture_after_another(kernels, root, length, plain):
    from mergekit_mediator import MediatorModel

    ids = torch.randint(4, 60, (5, length), generator=torch.Generator().manual_seed(1)).to(kernels)

    def answers(apply):
        model = MediatorModel.from_pretrained(root)
        model.model.to(kernels)
        logits = model.forward(ids, mixture=MIXTURES, apply=apply).logits
        settings = {"mixture": MIXTURES, "apply": apply, **GREEDY}
        return logits, *(model.generate(ids, **settings, num_beams=beams) for beams in (1, 2))

    rows, merged = answers("rows"), answers("merge")
    plain()
    for others in (merged, answers("rows")):
        torch.testing.assert_close(rows[0], others[0], rtol=1e-3, atol=1e-4)
        assert all(torch.equal(*pair) for pair in zip(rows[1:], others[1:], strict=True))


def test_gradients_pass_through_the_sparse_parts(kernels, plain):
    module = nn.Linear(64, 48, bias=False).requires_grad_(False)
    one = stored("exact", module.weight.data, 0, 0.2).to(kernels)
    module.to(kernels)
    gradients = []
    for _ in range(2):
        numbers = [1.0, 0.5]
        part = Part(
            one,
            numbers,
            torch.tensor(numbers, device=kernels),
            lambda: sparse_matrix(module.weight.data, one),
        )
        x = torch.ones(2, 1, 64, device=kernels, requires_grad=True)
        run(module, [part], x, 2).square().sum().backward()
        gradients.append(x.grad)
        plain()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
