"""The calibrated router: features of a prompt -> which expert, how sure, how far from the known.

Features are `embedding`, the mean embedding of the prompt's tokens, which needs no forward pass, or
`hidden`, hidden states of the dense expert (see `hidden`). The head is linear in them; `fit_router`
fits it.
The file holds the features of the calibration prompts, so that one expert can be added or removed
later; they are means over tokens, but not secret: do not calibrate with prompts that are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.route.calibrated_file import KIND, TENSORS, Limits, read
from mergekit_mediator.route.calibrated_file import Head as Head
from mergekit_mediator.route.calibrated_file import Kind as Kind
from mergekit_mediator.route.decision import RoutingDecision, decide_from_scores
from mergekit_mediator.store.router_file import save_tensors


@dataclass(frozen=True)
class CalibratedRouter:
    """A linear head with a temperature, and two measures of distance.

    kind: which features it takes; `layers` are those of `hidden`, else empty.
    head, seed: how it was fitted, so that `fit.add` fits alike.
    features: by expert, `[n_prompts, d]` float32, of the calibration prompts.
    tokens: `[k]` int64: for `embedding` those that do not count, see `mean_embedding`; for `hidden`
        those that are put after every prompt, see `features.hidden_features`.
    center, scale: `[d]` float32, of the features over all prompts, see `standardized`.
    weight, bias: `[n_experts, d]`, `[n_experts]` float32; with x the standardized features,
        `scores = x @ weight.T + bias`.
    background: `[m, d]` float32, features of requests that belong to no expert, see `background`.
    fit_weight, fit_bias: of the ridge regression on class membership (1 or 0), less that on
        membership in the background; the largest output is low far from every class.
    near_weight, near_bias: of the scores that order experts by their distance, likewise.
    spread: `[r, d]` float32. The squared Mahalanobis distance of x from a class, in the shrunk
        covariance within classes, is `‖x‖²/variance − ‖spread x‖² − 2 (near score)`.
    numbers: `temperature`; `entropy_threshold` (normalised, 0 to 1); `ood_threshold`; `variance`;
        and, over held-out prompts, mean and deviation of minus that output (`fit_*`) and of
        the least distance (`distance_*`).
    """

    kind: Kind
    layers: tuple[int, ...]
    head: Head
    seed: int
    features: Mapping[str, Tensor]
    tokens: Tensor
    background: Tensor
    center: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    fit_weight: Tensor
    fit_bias: Tensor
    near_weight: Tensor
    near_bias: Tensor
    spread: Tensor
    numbers: Mapping[str, float]

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the order of a decision's columns."""
        return tuple(self.features)

    def decide(self, features: Tensor, temperature: float | None = None) -> RoutingDecision:
        """Route prompts by their features, `[batch, d]`.

        The out-of-distribution score is the mean of two misfits in deviations from their means: how
        little any class claims the prompt next to the background, and how far it is from the nearest class. Above
        `numbers["ood_threshold"]` it is farther than 85% of the held-out calibration prompts, whose
        wordings were held out too.

        Raises:
            RoutingError: features of another width, or not finite.
        """
        width = self.weight.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise RoutingError(
                f"{self.kind} features must be [batch, {width}], got {list(features.shape)}: was "
                "the router calibrated for another model?"
            )
        x = features.detach().to(self.weight.device, torch.float32)
        if not torch.isfinite(x).all():
            raise RoutingError(f"the {self.kind} features of a request are not finite")
        scores, fit, distance = self.measure(x)
        return decide_from_scores(
            scores,
            self.experts,
            temperature or self.numbers["temperature"],
            out_of_distribution(fit, distance, self.numbers),
        )

    def measure(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores `[batch, n_experts]`, how much more the background claims the prompt than any class
        does, and the least Mahalanobis distance, each `[batch]`, of features `[batch, d]`."""
        x = standardized(features, self.center, self.scale, len(self.layers) or 1)
        fit = -(x @ self.fit_weight.T + self.fit_bias).max(dim=1).values
        energy = x.square().sum(dim=1) / self.numbers["variance"]
        energy = energy - (x @ self.spread.T).square().sum(dim=1)
        nearest = (x @ self.near_weight.T + self.near_bias).max(dim=1).values
        distance = (energy - 2 * nearest).clamp_min(0).sqrt()
        return x @ self.weight.T + self.bias, fit, distance

    def save(self, path: Path) -> None:
        """Write to a safetensors file, in place of an older one."""
        tensors = {f"features.{name}": x for name, x in self.features.items()}
        tensors |= {name: getattr(self, name) for name in TENSORS}
        about = {
            "experts": list(self.experts),
            "features": self.kind,
            "layers": list(self.layers),
            "head": self.head,
            "seed": self.seed,
            "numbers": dict(self.numbers),
        }
        save_tensors(path, KIND, tensors, about)

    @classmethod
    def load(
        cls, path: Path, experts: Sequence[str] | None = None, limits: Limits | None = None
    ) -> "CalibratedRouter":
        """Read what `save` wrote; the arguments and errors are those of `calibrated_file.read`."""
        return cls(**read(path, experts, limits))


def standardized(features: Tensor, center: Tensor, scale: Tensor, blocks: int) -> Tensor:
    """Features `[batch, d]` centred and scaled, each of `blocks` equal parts of length 1.

    Few directions hold most of a hidden state's length; scaled, all say something about the task.
    """
    x = (features - center) / scale
    return torch.nn.functional.normalize(
        x.view(len(x), blocks, x.shape[1] // blocks), dim=2
    ).flatten(1)


def out_of_distribution(fit: Tensor, distance: Tensor, numbers: Mapping[str, float]) -> Tensor:
    """The mean of both misfits, each in deviations from its mean over held-out prompts, `[n]`."""
    a = (fit - numbers["fit_mean"]) / numbers["fit_deviation"]
    b = (distance - numbers["distance_mean"]) / numbers["distance_deviation"]
    return (a + b) / 2
