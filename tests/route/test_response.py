"""Routing by how strongly each expert's change answers to a request's activations."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergekit_mediator.errors import ArtifactError, RoutingError
from mergekit_mediator.route.response import ResponseRouter, is_measured, leading_directions
from mergekit_mediator.store.router_file import save_tensors

WEIGHT = "block.down.weight"


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"down": nn.Linear(6, 4, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["down"](x)


def low_rank(rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)


def axes(*columns: int) -> ResponseRouter:
    """A router of experts a and b, each of which changed one input column of the weight."""
    taus = [torch.zeros(4, 6).index_fill(1, torch.tensor([column]), 1.0) for column in columns]
    directions = torch.stack([leading_directions(tau) for tau in taus])
    return ResponseRouter(tuple("ab"[: len(columns)]), {WEIGHT: directions})


def measure(router: ResponseRouter, x: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    counted = torch.ones(x.shape[:2], dtype=torch.bool) if counted is None else counted
    model = Tiny()
    with router.recording(model, counted) as responses:
        model(x)
    return responses


def test_directions_hold_the_energy_of_a_low_rank_change() -> None:
    tau = low_rank(3)
    directions = leading_directions(tau, rank=4).float()
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    exact = (x @ tau.T).norm(dim=1) / tau.norm()
    torch.testing.assert_close((x @ directions.T).norm(dim=1), exact, rtol=5e-3, atol=1e-4)


def test_directions_match_an_exact_svd() -> None:
    tau = low_rank(12)
    got = leading_directions(tau, rank=2).float()
    _, values, vectors = torch.linalg.svd(tau)
    want = values[:2, None] * vectors[:2] / tau.norm()
    torch.testing.assert_close(
        (got * want).sum(dim=1).abs(), want.square().sum(dim=1), rtol=1e-2, atol=1e-3
    )


def test_directions_are_the_same_for_the_same_seed() -> None:
    assert torch.equal(leading_directions(low_rank(9)), leading_directions(low_rank(9)))


def test_a_weight_that_did_not_change_has_no_directions() -> None:
    assert not leading_directions(torch.zeros(3, 8)).any()


def test_only_projections_into_the_residual_stream_are_measured() -> None:
    assert is_measured((64, 256), 64)
    assert not is_measured((256, 64), 64)
    assert not is_measured((32, 64), 64)
    assert not is_measured((64,), 64)


def test_the_expert_whose_change_meets_the_request_is_chosen() -> None:
    router = axes(0, 3)
    x = torch.full((2, 5, 6), 0.1)
    x[0, :, 0] = 2.0
    x[1, :, 3] = 2.0
    reference = measure(router, torch.ones(1, 2, 6))
    got = router.decide(measure(router, x), reference)
    assert got.weights.argmax(dim=1).tolist() == [0, 1]
    assert got.experts == ("a", "b")


def test_responses_match_the_formula() -> None:
    router = axes(0, 3)
    x = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(2))
    share = x[0, :, [0, 3]].square() / x[0].square().sum(dim=1, keepdim=True)
    want = share.mean(dim=0).log() / 2
    torch.testing.assert_close(measure(router, x)[WEIGHT][0], want, rtol=2e-3, atol=2e-3)


def test_tokens_that_do_not_count_change_nothing() -> None:
    router, x = axes(0, 3), torch.randn(1, 4, 6)
    padded = torch.cat([torch.full((1, 3, 6), 7.0), x], dim=1)
    counted = torch.tensor([[False] * 3 + [True] * 4])
    torch.testing.assert_close(measure(router, padded, counted), measure(router, x))


def test_the_scale_of_a_change_does_not_matter() -> None:
    torch.testing.assert_close(
        leading_directions(low_rank(3) * 1000).abs(), leading_directions(low_rank(3)).abs()
    )


def test_hooks_are_gone_after_recording() -> None:
    router, model = axes(0, 3), Tiny()
    with router.recording(model, torch.ones(1, 2, dtype=torch.bool)) as responses:
        pass
    model(torch.ones(1, 2, 6))
    assert responses == {}


def test_a_model_without_the_weights_is_refused() -> None:
    router = axes(0, 3)
    assert router.applies_to(Tiny())
    assert not router.applies_to(nn.Linear(6, 4))
    with pytest.raises(RoutingError, match="linear layer"):  # noqa: SIM117
        with router.recording(nn.Linear(6, 4), torch.ones(1, 1, dtype=torch.bool)):
            pass


def test_a_saved_router_comes_back_within_about_half_a_step(tmp_path: Path) -> None:
    directions = torch.randn(2, 3, 600, generator=torch.Generator().manual_seed(0)).half()
    directions[1, 2] = 0
    router = ResponseRouter(("a", "b"), {WEIGHT: directions})
    router.save(tmp_path / "response.safetensors")
    again = ResponseRouter.load(tmp_path / "response.safetensors")
    assert again.experts == router.experts
    error = (again.directions[WEIGHT].float() - directions.float()).abs()
    step = 2**-0.5 * directions.float().square().mean(dim=2, keepdim=True).sqrt()
    assert bool((error <= 0.7 * step).all())  # the scale that is best on the whole differs a little
    assert (tmp_path / "response.safetensors").stat().st_size < 3 * directions.numel() / 8 + 500


STREAM = torch.zeros(48, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "shapes", "message"),
    [
        ({}, None, "`shapes` must be an object, got None"),
        ({}, {WEIGHT: [2, 4]}, r"a shape \[2, rank, in\] required, got \[2, 4\]"),
        ({}, {WEIGHT: [2, 4, -6]}, r"a shape \[2, rank, in\] required, got \[2, 4, -6\]"),
        ({}, {WEIGHT: [2, 4, 6]}, "must be a stream of bytes, got none"),
        (
            {WEIGHT: torch.zeros(2, 4, 6)},
            {WEIGHT: [2, 4, 6]},
            "must be a stream of bytes, got torch.float32",
        ),
        (
            {WEIGHT: STREAM},
            {WEIGHT: [2, 4, 6]},
            r"scale must be \[2, 4, 1\] of torch.float32, got none",
        ),
        (
            {WEIGHT: STREAM, f"{WEIGHT}.scale": torch.zeros(2, 4)},
            {WEIGHT: [2, 4, 6]},
            r"scale must be \[2, 4, 1\] of torch.float32, got \[2, 4\]",
        ),
        (
            {WEIGHT: STREAM[:40], f"{WEIGHT}.scale": torch.zeros(2, 4, 1)},
            {WEIGHT: [2, 4, 6]},
            "a stream",
        ),
    ],
)
def test_directions_of_another_form_are_refused(tmp_path: Path, tensors, shapes, message) -> None:
    path = tmp_path / "response.safetensors"
    save_tensors(path, "response", tensors, {"experts": ["a", "b"], "shapes": shapes})
    with pytest.raises(ArtifactError, match=message):
        ResponseRouter.load(path)


def test_a_file_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "response.safetensors"
    ResponseRouter(("a", "b", "c"), axes(0, 3).directions).save(path)
    with pytest.raises(ArtifactError, match=r"\[3, rank, in\]"):
        ResponseRouter.load(path)


def test_a_file_without_a_router_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "response.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="no router"):
        ResponseRouter.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ArtifactError, match="the router cannot be read"):
        ResponseRouter.load(path)
    with pytest.raises(ArtifactError, match="the router cannot be read"):
        ResponseRouter.load(tmp_path / "missing.safetensors")
