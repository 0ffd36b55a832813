"""The methods against the code of their authors, which ran elsewhere: see tests/data/methods/make.py."""

from pathlib import Path

import mergekit.merge_methods  # noqa: F401 (the plugin completes it)
import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file

from mergekit_mediator.merge import plugin
from mergekit_mediator.methods import doge
from mergekit_mediator.methods.fisher import Fisher
from mergekit_mediator.methods.order_statistics import order_statistics
from mergekit_mediator.methods.regmean_pp import RegressionMean
from mergekit_mediator.methods.task_vector_method import ModelWeight
from mergekit_mediator.methods.whole_model import FIGURES

plugin.install()
DATA = load_file(Path(__file__).parents[1] / "data/methods/references.safetensors")
PROMPTED = load_file(Path(__file__).parents[1] / "data/methods/prompted.safetensors")
EXPERTS = 3


def models(kind):
    """The base model and the experts that the authors' code merged."""
    found = []
    for index in range(EXPERTS + 1):
        prefix = f"models/{kind}/{index}/"
        found.append({k.removeprefix(prefix): v for k, v in DATA.items() if k.startswith(prefix)})
    return found


def expected(method):
    prefix = f"{method}/"
    return {k.removeprefix(prefix): v for k, v in DATA.items() if k.startswith(prefix)}


def task_vector(method, kind="Model", **parameters):
    base, *experts = models(kind)
    merged = merge_state_dicts([base, *experts], method, base=0, parameters=parameters)
    return {name: merged[name] - base[name] for name in merged}


@pytest.mark.parametrize(
    ("method", "kind", "parameters"),
    [
        ("tsvm", "Model", {}),
        ("iso_c", "Model", {}),
        ("pcb", "Model", {"density": 0.1}),
        ("widen", "Language", {}),
        ("localize_and_stitch", "Model", {"density": 0.2}),
        ("opcm", "Model", {"alpha": 0.5}),
        ("wudi", "Model", {"steps": 300, "rate": 1e-5}),
    ],
)
def test_a_method_gives_what_the_code_of_its_authors_gives(method, kind, parameters):
    found, wanted = task_vector(method, kind, **parameters), expected(method)
    assert found.keys() >= wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)
    assert any(tensor.abs().max() > 0.01 for tensor in wanted.values())


class Stored:
    """Figures as the merge would have measured them."""

    def __init__(self, by_weight):
        self.of = by_weight.__getitem__


def prompted(kind, name, experts=EXPERTS):
    """The figures that the authors' code was given, `[experts, *shape]`."""
    return torch.stack([PROMPTED[f"{kind}/{index}/{name}"] for index in range(experts)])


def test_fisher_gives_what_fusion_bench_gives():
    base, *experts = models("Model")
    norms = torch.stack([prompted("information", n).flatten(1).norm(dim=1) for n in base]).norm(
        dim=0
    )
    size = (sum(weight.numel() for weight in base.values())) ** 0.5
    for name, weight in base.items():
        information = prompted("information", name)
        scale = (size / norms).view(-1, *[1] * weight.ndim)
        taus = torch.stack([expert[name] - weight for expert in experts])
        figures = {FIGURES: Stored({name: information * scale})}
        found = Fisher().combine(ModelWeight(name, weight, taus), figures)
        torch.testing.assert_close(found, PROMPTED[f"fisher/{name}"], atol=1e-5, rtol=0, msg=name)


def test_regmean_pp_solves_what_fusion_bench_solves():
    base, *experts = models("Model")
    matrices = [name for name, weight in base.items() if weight.ndim == 2]
    assert len(matrices) == 3
    for name in matrices:
        means = RegressionMean(0.9)
        for expert, products in zip(experts, prompted("products", name), strict=True):
            means.add(expert[name] - base[name], products)
        wanted = PROMPTED[f"regmean_pp/{name}"]
        torch.testing.assert_close(means.merged(), wanted, atol=1e-5, rtol=0, msg=name)


def test_wudi_goes_as_far_in_30_large_steps_as_in_300_small_ones():
    base, *experts = models("Model")
    far, near = task_vector("wudi"), task_vector("wudi", steps=300, rate=1e-5)
    for name, weight in base.items():
        start = sum(expert[name] - weight for expert in experts)
        if weight.ndim == 2:
            way = (near[name] - start).norm()
            assert (far[name] - near[name]).norm() < 0.1 * way


def rows_left(taus, factors, change):
    """The loss of DOGE: the squared left sides of its equations, over all experts and rows."""
    merged = torch.einsum("t,tmn->mn", factors, taus) + factors.sum() * change
    return float(((taus * (taus - merged)).sum(dim=2) ** 2).sum())


@pytest.mark.parametrize("matrix", ["square", "tall", "wide"])
def test_doge_finds_a_change_as_good_as_the_400_steps_of_its_authors(matrix):
    name = f"encoder.{matrix}.weight"
    base, *experts = models("Model")
    taus = torch.stack([expert[name] - base[name] for expert in experts])
    factors = 0.07 / taus.flatten(1).norm(dim=1)
    subspace = doge.common_subspace(taus, 3)
    theirs = expected("doge")[f"{name}.delta"]
    ours = doge.shared_change(taus, factors, subspace)
    at_first = rows_left(taus, factors, torch.zeros_like(ours))
    assert rows_left(taus, factors, ours) <= rows_left(taus, factors, theirs) + 2e-3 * at_first
    torch.testing.assert_close(ours, best_change(taus, factors, subspace), atol=2e-3, rtol=2e-3)


def best_change(taus, factors, subspace):
    """The same change from all equations at once, in float64."""
    experts, rows, columns = taus.shape
    taus, scale = taus.double(), float(factors.sum())
    total = torch.einsum("t,tmn->mn", factors.double(), taus)
    wanted = (taus * (taus - total)).sum(dim=2).flatten()
    equations = torch.zeros(experts, rows, rows, columns, dtype=torch.float64)
    for row in range(rows):
        equations[:, row, row] = scale * taus[:, row]
    off = torch.eye(rows, dtype=torch.float64) - subspace.double() @ subspace.mT.double()
    allowed = torch.einsum("tabn,bc->tacn", equations, off).flatten(2).flatten(0, 1)
    ridge = doge._RIDGE * scale**2 * float(taus.square().sum(dim=2).mean())
    system = allowed @ allowed.mT + ridge * torch.eye(len(allowed), dtype=torch.float64)
    return (allowed.mT @ torch.linalg.solve(system, wanted)).view(rows, columns).float()


@pytest.mark.parametrize("matrix", ["square", "tall", "wide"])
def test_doge_keeps_and_scales_as_its_authors_do(matrix, monkeypatch):
    # with their change in place of ours, which is another minimum of the same loss
    deltas = {t.shape: t for n, t in expected("doge").items() if n.endswith("delta")}
    monkeypatch.setattr(doge, "shared_change", lambda taus, *_: deltas[taus.shape[1:]])
    # they leave all but matrices to the base, before they choose the largest magnitudes
    base, *experts = ({n: w for n, w in m.items() if w.ndim == 2} for m in models("Model"))
    parameters = {"norm": 0.07, "subspace": 3, "density": 0.3}
    merged = merge_state_dicts([base, *experts], "doge", base=0, parameters=parameters)
    name = f"encoder.{matrix}.weight"
    torch.testing.assert_close(merged[name] - base[name], expected("doge")[name], atol=1e-5, rtol=0)


def test_r_tsvm_is_tsvm_of_reweighted_experts_with_ranks_of_their_own():
    # an oracle of the formulas in its docstring, with full decompositions
    base, *experts = models("Model")
    name = "encoder.tall.weight"
    taus = [expert[name] - base[name] for expert in experts]
    taus[1] = taus[1] * (taus[1].abs() > 0.08)  # a sparse change
    tails = [
        float((t[t.abs() > 2 * t.square().mean().sqrt()] ** 2).sum() / t.norm() ** 2) for t in taus
    ]
    densities = [float(t.abs().sum() ** 2 / (t.numel() * t.norm() ** 2)) for t in taus]
    ranks = [max(1, int(6 * d / sum(densities))) for d in densities]
    assert ranks[1] < ranks[0]
    parts = []
    for tau, tail, rank in zip(taus, tails, ranks, strict=True):
        left, values, right = torch.linalg.svd(tau * (1 + tail) * 3 / (3 + sum(tails)))
        parts.append((left[:, :rank], values[:rank], right[:rank].T))
    left, values, right = (torch.cat(p, dim=-1) for p in zip(*parts, strict=True))

    def nearest(matrix):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        return u @ v

    merged = merge_state_dicts(
        [{"w": torch.zeros(14, 6)}, *({"w": tau} for tau in taus)],
        "r_tsvm",
        base=0,
        parameters={"outliers": 2.0},
    )["w"]
    oracle = nearest(left) @ torch.diag(values) @ nearest(right).T
    torch.testing.assert_close(merged, oracle, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 7, 70_000])
def test_order_statistics_are_those_of_a_sort(size):
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(3, size, generator=generator)
    values[:, ::3] *= 1e-20
    values[:, ::5] = 0.0
    positions = sorted({0, size // 3, size // 2, size - 1})
    found = order_statistics(lambda: values.split(1000, dim=1), lambda count: positions)
    assert torch.equal(found, values.sort(dim=1).values[:, positions])
