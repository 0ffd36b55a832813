"""Routing without any data: it chooses the expert whose task vector responds most strongly to the request.

Training changes a weight `W` along the inputs that it saw: a gradient of `W` is a sum of outer products with
inputs. So a task vector τt amplifies the activations of its own task more than others. This holds even if the
expert's likelihood of the prompt tells nothing (experts are usually trained on answers only). With `x` the
inputs of a weight at the request's tokens in the dense expert,

    r_t(weight) = 1/2 log( mean_x ‖τt x‖² / (‖τt‖_F² ‖x‖²) )        in nats
    score_t     = mean over weights of r_t  −  the same for a reference prompt

The reference prompt is the chat template around an empty message; it removes each expert's own bias. The
leading right singular vectors of τt are enough. The router measures the projections out of the MLPs, whose
inputs are the most specific. One pass of the dense expert serves all experts. The formula is ours; Arrow
(Ostapenko et al., arXiv 2405.11157) had the idea to route by the right singular vectors of low-rank experts.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factor_steps import codes
from mergekit_mediator.errors import ArtifactError, RoutingError
from mergekit_mediator.models.hooks import Hook, hooked
from mergekit_mediator.models.scope import scope
from mergekit_mediator.route.decision import RoutingDecision, decide_from_scores
from mergekit_mediator.store.router_file import RouterFile, listed, save_tensors
from mergekit_mediator.store.streams import byte_planes, from_byte_planes, pack, unpack

# Nats of response. benchmarks/results/router-no-data.json shows how sure the decisions are with it; there is no
# record of a search.
TEMPERATURE = 0.03
_SCALE = ".scale"
_FINENESS = 3.0  # of stored directions, see `factor_steps`
_MOST_DIRECTIONS = 64  # the most directions per expert and weight that a file may have
_ROUNDS = 2  # of the random projection
_SMALLEST = 1e-20  # keeps the log finite for an expert that did not change a weight


def is_measured(shape: Sequence[int], hidden_size: int) -> bool:
    """Tell whether response routing measures a weight, as it does the last projection of an MLP.

    Args:
        shape: `[out, in]`. A measured weight has `out` equal to `hidden_size`, and a larger `in`.
        hidden_size: the width of the residual stream.
    """
    return len(shape) == 2 and shape[0] == hidden_size and shape[1] > hidden_size


def leading_directions(task_vector: Tensor, rank: int = 4) -> Tensor:
    """Compute the leading right singular vectors of τ/‖τ‖_F, each times its singular value, by random projection.

    Args:
        task_vector: `[out, in]`, any float dtype. The computation is in float32 on its device.
        rank: the number of vectors.

    Returns:
        `[rank, in]` float16. Rows are zero if τ has fewer directions.
    """
    tau = task_vector.to(torch.float32)
    result = torch.zeros(rank, tau.shape[1], dtype=torch.float16, device=tau.device)
    parts = decompose(tau, most=rank, rounds=_ROUNDS)
    if parts.energy:
        directions = (parts.right * (parts.values / math.sqrt(parts.energy))).T
        result[: len(directions)] = directions.to(torch.float16)
    return result


@dataclass(frozen=True)
class ResponseRouter:
    """The router that needs no data, by every expert's leading directions in the measured weights.

    Attributes:
        experts: the experts' names, in the order of the first dimension of `directions`.
        directions: by weight name, `[n_experts, rank, in]` float16, see `leading_directions`.
    """

    experts: tuple[str, ...]
    directions: Mapping[str, Tensor]

    def applies_to(self, model: nn.Module) -> bool:
        """Tell whether any measured weight belongs to a linear layer of the model."""
        return any(True for _ in self._layers(model))

    @scope
    def recording(
        self, model: nn.Module, counted: Tensor
    ) -> Generator[dict[str, Tensor], None, None]:
        """Measure responses while the dense expert runs on a batch.

        Args:
            model: a model that holds the dense expert; its submodules have the weights' names.
            counted: `[batch, seq]` bool, the tokens that count, at least one per row. Padding and the
                template tokens that every request begins with do not count.

        Yields:
            A dictionary that the forward pass fills: by weight, r_t `[batch, n_experts]` float32, in nats.

        Raises:
            RoutingError: no measured weight belongs to a linear layer of the model.
        """
        responses: dict[str, Tensor] = {}
        hooks = [
            Hook(module, _hook(responses, name, directions, counted), before=True)
            for name, directions, module in self._layers(model)
        ]
        if not hooks:
            raise RoutingError(
                f"none of the {len(self.directions)} weights that response routing measures is a "
                "linear layer of this model: use router='likelihood', or run `mergekit-mediator calibrate`"
            )
        with hooked(hooks):
            yield responses

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Linear]]:
        modules = dict(model.named_modules())
        for name, directions in self.directions.items():
            module = modules.get(name.removesuffix(".weight"))
            if isinstance(module, nn.Linear) and module.in_features == directions.shape[2]:
                yield name, directions, module

    def decide(
        self,
        responses: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        temperature: float = TEMPERATURE,
    ) -> RoutingDecision:
        """Score responses against those of the reference prompt.

        Args:
            responses: by weight, `[batch, n_experts]`, from `recording`, in nats.
            reference: by weight, `[1, n_experts]`, the responses to the reference prompt.
            temperature: in nats of response.

        Returns:
            A decision whose `ood` is minus the strongest score. It orders requests; there is no threshold
            for it without data.
        """
        scores = torch.stack([responses[name] - reference[name] for name in responses]).mean(dim=0)
        return decide_from_scores(scores, self.experts, temperature, -scores.max(dim=1).values)

    def save(self, path: Path) -> None:
        """Write the router to a safetensors file, each direction in steps of 0.7 of its root mean square.

        These steps change a probability by less than 0.01. The streams of codes have the form of factors', see
        docs/format.md.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors, shapes = {}, {}
        for name, directions in self.directions.items():
            vectors = directions.to("cpu", torch.float32).flatten(0, 1).T
            lengths = vectors.norm(dim=0).clamp_min(_SMALLEST)
            steps = codes(vectors / lengths, torch.full_like(lengths, _FINENESS))
            values = steps.to(torch.float32)
            # least squares: with this scale the codes come nearest to the direction
            scale = (values * vectors).sum(0) / values.square().sum(0).clamp_min(_SMALLEST)
            (plane,) = byte_planes(steps.T.reshape(-1).numpy(), all_planes=True)
            tensors[name] = torch.frombuffer(bytearray(pack(plane)), dtype=torch.uint8)
            tensors[name + _SCALE] = scale.view(*directions.shape[:2], 1)
            shapes[name] = list(directions.shape)
        save_tensors(path, "response", tensors, {"experts": list(self.experts), "shapes": shapes})

    @classmethod
    def load(
        cls,
        path: Path,
        experts: Sequence[str] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> "ResponseRouter":
        """Read a router from a file that `save` wrote.

        Args:
            path: the file.
            experts: the experts of the artifact, which must be the router's; None if they are not known.
            shapes: by name, the shape of each weight of the dense checkpoint. They bound the size of the
                decoded directions. None to trust the file.

        Raises:
            ArtifactError: the file is missing, damaged or inconsistent, holds a router of another kind, or
                belongs to other experts.
        """
        file = RouterFile(path, "response")
        names, stored_shapes = file.experts(experts), file.about.get("shapes")
        if not isinstance(stored_shapes, dict):
            raise ArtifactError(f"{path}: `shapes` must be an object, got {short(stored_shapes)}")
        for name, shape in stored_shapes.items():
            _check(file, path, name, shape, len(names))
            if shapes is not None:
                _check_weight(f"{path}: {listed([name])}", shape, shapes.get(name))
        directions = {}
        for name, shape in stored_shapes.items():
            plane = unpack(file.read(name).numpy(), math.prod(shape), f"{path}: {name}")
            steps = torch.from_numpy(from_byte_planes([plane], 1)).view(*shape)
            scaled = steps.to(torch.float32) * file.read(name + _SCALE)
            directions[name] = scaled.to(torch.float16)
        return cls(names, directions)


def _check(file: RouterFile, path: Path, name: str, shape: Any, experts: int) -> None:
    """Check the header of the directions in one weight.

    Raises:
        ArtifactError: they are missing, or have another shape or dtype.
    """
    where = f"{path}: {listed([name])}"
    if not _is_shape(shape) or shape[0] != experts:
        raise ArtifactError(f"{where}: a shape [{experts}, rank, in] required, got {short(shape)}")
    if shape[1] > _MOST_DIRECTIONS:
        raise ArtifactError(
            f"{where}: at most {_MOST_DIRECTIONS} directions of an expert required, got {shape[1]}"
        )
    dtype, sizes = file.header(name)
    if dtype != torch.uint8 or len(sizes) != 1:
        got = "none" if dtype is None else f"{dtype} {sizes}"
        raise ArtifactError(f"{where} must be a stream of bytes, got {got}")
    dtype, sizes = file.header(name + _SCALE)
    if dtype != torch.float32 or sizes != [*shape[:2], 1]:
        got = "none" if dtype is None else f"{sizes} of {dtype}"
        raise ArtifactError(
            f"{where}{_SCALE} must be {[*shape[:2], 1]} of {torch.float32}, got {got}"
        )


def _check_weight(where: str, shape: list[int], weight: tuple[int, ...] | None) -> None:
    """Check that directions `[n_experts, rank, in]` belong to a weight `[out, in]`.

    Raises:
        ArtifactError: the weight has another `in`, or there is no such weight.
    """
    if weight is None or len(weight) != 2 or weight[1] != shape[2]:
        got = "none" if weight is None else list(weight)
        raise ArtifactError(
            f"{where}: directions of a weight [out, {shape[2]}], but the dense checkpoint has {got}"
        )


def _is_shape(shape: object) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    )


def _hook(
    responses: dict[str, Tensor], name: str, directions: Tensor, counted: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().to(torch.float32)
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST)
        d = directions.to(x.device, torch.float32)
        energy = (x @ d.flatten(0, 1).T).unflatten(-1, d.shape[:2]).square().sum(dim=-1)
        mask = counted.to(x.device, torch.float32)[..., None]
        mean = (energy * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        responses[name] = mean.clamp_min(_SMALLEST).log() / 2

    return hook
