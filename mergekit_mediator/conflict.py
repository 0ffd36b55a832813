"""How much the task vectors of several experts conflict, per tensor and per layer.

With task vectors τ_t = θ_t − θ_0 in float32, for the coordinates j of a layer:

- sign: of the coordinates that at least two experts changed after denoising, the fraction where two
  of them have opposite signs. Denoising keeps, per tensor and expert, the `denoise` fraction of the
  largest |τ|, with all ties at the threshold; an exact zero is never a change.
- mass: Σ_j 2·min(P_j, N_j) / Σ_j (P_j + N_j), with P and N the summed positive and negative parts.
  Since P + N = Σ_t |τ_t| and P − N = Σ_t τ_t, it is 1 − Σ_j |Σ_t τ_tj| / Σ_j Σ_t |τ_tj|.
- dispersion: Σ_t ‖τ_t − τ̄‖² / Σ_t ‖τ_t‖², which is 1 − ‖Σ_t τ_t‖² / (T · Σ_t ‖τ_t‖²) for T experts.

All are in [0, 1] and 0 where nothing changed. The formulas are this project's own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from mergekit_mediator.threshold import chunks, count_kept, kth_largest
from mergekit_mediator.workers import Map

Metric = Literal["sign", "mass", "dispersion"]
METRICS: tuple[Metric, ...] = ("sign", "mass", "dispersion")


@dataclass(frozen=True)
class Conflict:
    """The sums that the three metrics are made of; adding those of tensors gives those of a layer."""

    shared: int = 0  # coordinates that at least two experts changed, after denoising
    opposed: int = 0  # of those, where two experts have opposite signs
    total_mass: float = 0.0  # Σ_j Σ_t |τ_tj|
    common_mass: float = 0.0  # Σ_j |Σ_t τ_tj|
    total_energy: float = 0.0  # Σ_t ‖τ_t‖²
    common_energy: float = 0.0  # ‖Σ_t τ_t‖² / T

    def __add__(self, other: "Conflict") -> "Conflict":
        return Conflict(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def sign(self) -> float:
        return self.opposed / self.shared if self.shared else 0.0

    @property
    def mass(self) -> float:
        return _complement(self.common_mass, self.total_mass)

    @property
    def dispersion(self) -> float:
        return _complement(self.common_energy, self.total_energy)

    def value(self, metric: Metric) -> float:
        """One metric by name, in [0, 1]."""
        return float(getattr(self, metric))


def measure(
    base: Tensor,
    experts: Sequence[Tensor],
    denoise: float,
    device: str = "cpu",
    over: Map = map,
) -> Conflict:
    """The conflict of one weight.

    Args:
        base: any shape, any floating dtype.
        experts: two or more tensors of the base's shape.
        denoise: fraction in (0, 1] of each task vector that counts as a change for `sign`.
        device: where the arithmetic is done, chunk by chunk; the inputs may be elsewhere.
        over: what runs the independent parts; see `workers`.
    """
    base, experts = base.reshape(-1), [e.reshape(-1) for e in experts]
    thresholds = list(over(lambda e: _denoise_threshold(base, e, denoise, device), experts))

    def measure_chunk(part: slice) -> Conflict:
        taus = task_vectors(base[part], [e[part] for e in experts], device)
        return _measure_chunk(taus, thresholds)

    return sum(over(measure_chunk, chunks(base.numel())), Conflict())


def task_vectors(base: Tensor, experts: Iterable[Tensor], device: str = "cpu") -> Iterator[Tensor]:
    """θ_t − θ_0 in float32, one at a time; coordinates that are not finite count as unchanged."""
    reference = base.to(device=device, dtype=torch.float32)
    for expert in experts:
        tau = expert.to(device=device, dtype=torch.float32) - reference
        yield tau.nan_to_num_(0.0, 0.0, 0.0)


def _measure_chunk(taus: Iterator[Tensor], thresholds: Sequence[float]) -> Conflict:
    total = next(taus)
    energy, absolute = _energy(total), total.abs()
    highest = _sign(total, thresholds[0])
    lowest, changes = highest.clone(), highest.abs().to(torch.int16)
    for tau, threshold in zip(taus, thresholds[1:], strict=True):
        energy += _energy(tau)
        sign = _sign(tau, threshold)
        total += tau
        absolute += tau.abs_()
        torch.maximum(highest, sign, out=highest)
        torch.minimum(lowest, sign, out=lowest)
        changes += sign.abs_()
    return Conflict(
        shared=int(torch.count_nonzero(changes > 1)),
        opposed=int(torch.count_nonzero(highest > lowest + 1)),
        total_mass=float(absolute.sum()),
        common_mass=float(total.abs().sum()),
        total_energy=energy,
        common_energy=_energy(total) / len(thresholds),
    )


def _sign(tau: Tensor, threshold: float) -> Tensor:
    """+1 or -1 (int8) where |τ| reaches the threshold, else 0.

    The quotient rounds to 1 only there, and the conversion drops the fraction of all others; this
    is several times faster than two comparisons.
    """
    return (tau / threshold).clamp_(-1, 1).to(torch.int8)


def _energy(values: Tensor) -> float:
    return float(values.square().sum())


def _denoise_threshold(base: Tensor, expert: Tensor, denoise: float, device: str) -> float:
    """The smallest |τ| that counts as a change: never 0, so that no change has no sign."""
    smallest = float(torch.finfo(torch.float32).smallest_normal)
    if denoise >= 1 or not base.numel():
        return smallest

    def magnitudes(part: slice) -> Tensor:
        (tau,) = task_vectors(base[part], [expert[part]], device)
        return tau.abs_()

    threshold, _ = kth_largest(magnitudes, base.numel(), count_kept(base.numel(), denoise))
    return max(threshold, smallest)


def _complement(part: float, whole: float) -> float:
    return min(1.0, max(0.0, 1.0 - part / whole)) if whole else 0.0
