"""The calibrated router: features of a prompt -> which expert, how sure, how far from the known.

The features are `embedding`, the mean embedding of the prompt's tokens, which needs no forward pass; or
`hidden`, hidden states of the dense expert (see `features`). The head is linear in them; `fit` fits it.

The router's file holds the features of the calibration prompts, so that an expert can be added or removed
later. Features tell something about the prompts: do not calibrate with secret prompts.
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
    """A linear head with a temperature, and two misfits: measures of how far a prompt is from all experts.

    Attributes:
        kind: the features that the router takes.
        layers: the decoder blocks of `hidden` features, see `features.hidden_layers`; empty for `embedding`.
        head: how the head was fitted, see `fit.fit`. `fit.add` fits with the same head and seed.
        seed: the seed of the fit.
        features: by expert, `[n_prompts, d]` float32, the features of the calibration prompts.
        tokens: `[k]` int64. For `embedding`, the tokens that do not count, see `features.mean_embedding`;
            for `hidden`, the tokens that follow every prompt, see `features.hidden_features`.
        center: `[d]` float32, the mean of the features over all prompts, see `standardized`.
        scale: `[d]` float32, their scale.
        weight: `[n_experts, d]` float32; with x the standardized features,
            `scores = x @ weight.T + bias`.
        bias: `[n_experts]` float32.
        background: `[m, d]` float32, the features of requests that belong to no expert, see `background`.
        fit_weight: `[n_experts, d]` float32, the weight of a ridge regression on membership in each class
            (1 or 0), minus the weight for membership in the background. The largest output is low far from
            every class.
        fit_bias: `[n_experts]` float32, likewise.
        near_weight: `[n_experts, d]` float32, the weight of the near scores, which order the experts by
            their distance.
        near_bias: `[n_experts]` float32, likewise.
        spread: `[r, d]` float32. The squared Mahalanobis distance of x from a class, in the shrunk
            covariance within classes, is `‖x‖²/variance − ‖spread x‖² − 2 (near score)`.
        numbers: `temperature` (in units of the scores); `entropy_threshold` (normalised, 0 to 1);
            `ood_threshold`; `variance`; and mean and deviation over held-out prompts of the two misfits:
            minus the largest output of the regression (`fit_*`), and the least distance (`distance_*`).
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
        """The names of the experts, in the order of a decision's columns."""
        return tuple(self.features)

    def decide(self, features: Tensor, temperature: float | None = None) -> RoutingDecision:
        """Route prompts by their features.

        The out-of-distribution score is the mean of two misfits, each in deviations from its mean: by how much
        the background claims the prompt more than any class does, and the distance from the nearest class.
        A prompt above `numbers["ood_threshold"]` is farther than 85% of the held-out calibration prompts,
        which have held-out wordings.

        Args:
            features: `[batch, d]`, any float dtype.
            temperature: in units of the scores; None for the fitted one.

        Raises:
            RoutingError: the features have another width, or are not finite.
        """
        width = self.weight.shape[1]
        if features.ndim != 2 or features.shape[1] != width:
            raise RoutingError(
                f"{self.kind} features must be [batch, {width}], got {list(features.shape)}: was "
                "the router calibrated for another model?"
            )
        x = features.detach().to(self.weight.device, torch.float32)
        if not torch.isfinite(x).all():
            raise RoutingError(
                f"the {self.kind} features of a request must be finite, got NaN or infinite ones: check "
                "the weights of the dense expert"
            )
        scores, fit, distance = self.measure(x)
        return decide_from_scores(
            scores,
            self.experts,
            temperature or self.numbers["temperature"],
            out_of_distribution(fit, distance, self.numbers),
        )

    def measure(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute scores and both misfits of prompts.

        Args:
            features: `[batch, d]` float32.

        Returns:
            Scores `[batch, n_experts]`; by how much the background claims the prompt more than any class
            does, `[batch]`; and the least Mahalanobis distance, `[batch]`.
        """
        x = standardized(features, self.center, self.scale, len(self.layers) or 1)
        fit = -(x @ self.fit_weight.T + self.fit_bias).max(dim=1).values
        energy = x.square().sum(dim=1) / self.numbers["variance"]
        energy = energy - (x @ self.spread.T).square().sum(dim=1)
        nearest = (x @ self.near_weight.T + self.near_bias).max(dim=1).values
        distance = (energy - 2 * nearest).clamp_min(0).sqrt()
        return x @ self.weight.T + self.bias, fit, distance

    def save(self, path: Path) -> None:
        """Write the router to a safetensors file, which replaces an older one.

        Raises:
            OutputError: the file cannot be written.
        """
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
        """Read a router from a file; the arguments and errors are those of `calibrated_file.read`."""
        return cls(**read(path, experts, limits))


def standardized(features: Tensor, center: Tensor, scale: Tensor, blocks: int) -> Tensor:
    """Centre and scale features, and normalise each of their parts to length 1.

    A few directions hold most of a hidden state's length. After scaling, all directions tell something about
    the task.

    Args:
        features: `[batch, d]`.
        center: `[d]`.
        scale: `[d]`.
        blocks: the number of equal parts of the features.

    Returns:
        `[batch, d]`.
    """
    x = (features - center) / scale
    return torch.nn.functional.normalize(
        x.view(len(x), blocks, x.shape[1] // blocks), dim=2
    ).flatten(1)


def out_of_distribution(fit: Tensor, distance: Tensor, numbers: Mapping[str, float]) -> Tensor:
    """Compute the mean of both misfits, each in deviations from its mean over held-out prompts.

    Args:
        fit: `[n]`, see `CalibratedRouter.measure`.
        distance: `[n]`, likewise.
        numbers: the means and deviations, see `CalibratedRouter`.

    Returns:
        `[n]`.
    """
    a = (fit - numbers["fit_mean"]) / numbers["fit_deviation"]
    b = (distance - numbers["distance_mean"]) / numbers["distance_deviation"]
    return (a + b) / 2
