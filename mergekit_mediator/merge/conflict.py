"""The conflict between the task vectors of several experts, for each tensor and each layer.

With task vectors τ_t = θ_t − θ_0 in float32, for the coordinates j of a layer:

- sign: of the coordinates that at least two experts changed after denoising, the fraction in which two
  of them have opposite signs. Denoising keeps the `denoise` fraction of the largest |τ| of each tensor and
  expert, with all ties at the threshold; an exact zero is never a change.
- mass: Σ_j 2·min(P_j, N_j) / Σ_j (P_j + N_j), with P and N the summed positive and negative parts.
  Since P + N = Σ_t |τ_t| and P − N = Σ_t τ_t, it is 1 − Σ_j |Σ_t τ_tj| / Σ_j Σ_t |τ_tj|.
- dispersion: Σ_t ‖τ_t − τ̄‖² / Σ_t ‖τ_t‖², which is 1 − ‖Σ_t τ_t‖² / (T · Σ_t ‖τ_t‖²) for T experts.

All metrics are in [0, 1], and 0 if no expert changed a coordinate. The formulas are this project's own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from mergekit_mediator.delta.chunks import chunks, float_on
from mergekit_mediator.delta.kth_largest import count_kept, kth_largest
from mergekit_mediator.merge.signs import PackedSigns, Signs

Metric = Literal["sign", "mass", "dispersion"]
METRICS: tuple[Metric, ...] = ("sign", "mass", "dispersion")


@dataclass(frozen=True)
class Conflict:
    """The sums behind the three metrics. The sum of the tensors' conflicts is the conflict of their layer."""

    shared: int = 0  # coordinates that at least two experts changed, after denoising
    opposed: int = 0  # shared coordinates on which two experts have opposite signs
    total_mass: float = 0.0  # Σ_j Σ_t |τ_tj|
    common_mass: float = 0.0  # Σ_j |Σ_t τ_tj|
    total_energy: float = 0.0  # Σ_t ‖τ_t‖²
    common_energy: float = 0.0  # ‖Σ_t τ_t‖² / T
    has_sign: bool = False  # whether `sign` was measured, which takes as long as the two others

    def __add__(self, other: "Conflict") -> "Conflict":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Conflict(**sums | {"has_sign": self.has_sign or other.has_sign})

    @property
    def metrics(self) -> dict[Metric, float]:
        """The metrics that were measured, each in [0, 1]."""
        return {m: self.value(m) for m in METRICS if m != "sign" or self.has_sign}

    @property
    def sign(self) -> float:
        """The metric `sign`, in [0, 1]; 0 if it was not measured."""
        return self.opposed / self.shared if self.shared else 0.0

    @property
    def mass(self) -> float:
        """The metric `mass`, in [0, 1]."""
        return _complement(self.common_mass, self.total_mass)

    @property
    def dispersion(self) -> float:
        """The metric `dispersion`, in [0, 1]."""
        return _complement(self.common_energy, self.total_energy)

    def value(self, metric: Metric) -> float:
        """Give the metric of a name, in [0, 1]."""
        return float(getattr(self, metric))


class Accumulator:
    """Sums and signs of one weight's task vectors, of experts that come one by one.

    No expert stays in memory, so memory does not grow with the number of experts.

    Attributes:
        total: Σ_t τ_t of the experts so far, `[numel]` float32.
        finite: whether all numbers so far are finite. Sums of chunks are checked rather than each number, so
            it is also False if the finite numbers of a chunk sum to infinity.
    """

    def __init__(self, base: Tensor, denoise: float | None, device: str = "cpu") -> None:
        """Start without experts.

        Args:
            base: θ_0, of any shape and floating dtype.
            denoise: the fraction in (0, 1] of each task vector that counts as a change for `sign`; None to leave
                `sign` unmeasured.
            device: the device that computes, chunk by chunk; the inputs may be on another device.
        """
        self._base, self._denoise, self._device = base.to(device), denoise, device
        self.total = torch.zeros(base.numel(), device=device)
        self._tau = torch.empty_like(self.total)
        self._signs: PackedSigns | Signs | None = None
        if denoise is not None:
            on_cpu = self.total.device.type == "cpu"
            self._signs = PackedSigns(base.numel()) if on_cpu else Signs(base.numel(), device)
        self.finite, self._experts = True, 0
        self._mass = self._energy = 0.0

    def add(self, expert: Tensor) -> Tensor:
        """Add one more expert.

        Args:
            expert: θ_t, a tensor of the base's shape and any floating dtype.

        Returns:
            τ_t, float32 in the base's shape. The next call overwrites it. In a chunk whose sum is not finite,
            coordinates that are not finite count as unchanged.
        """
        base, expert = self._base.reshape(-1), expert.reshape(-1)

        def subtract(part: slice) -> tuple[float, float]:
            tau = self._tau[part]
            torch.sub(
                float_on(self._device, expert[part]), float_on(self._device, base[part]), out=tau
            )
            mass = float(tau.abs().sum())
            if not math.isfinite(mass):
                self.finite = False
                mass = float(tau.nan_to_num_(0.0, 0.0, 0.0).abs().sum())
            self.total[part] += tau
            return mass, _energy(tau)

        for mass, energy in map(subtract, chunks(base.numel(), self._device)):
            self._mass += mass
            self._energy += energy
        if self._signs is not None and self._denoise is not None:
            self._signs.note(self._tau, self._threshold(self._denoise))
        self._experts += 1
        return self._tau.view(self._base.shape)

    def _threshold(self, denoise: float) -> float:
        """Find the smallest |τ| that counts as a change. It is above 0, so that every change has a sign."""
        smallest, numel = float(torch.finfo(torch.float32).smallest_normal), self._tau.numel()
        if denoise >= 1 or not numel:
            return smallest
        count = count_kept(numel, denoise)
        threshold, _ = kth_largest(
            lambda part: self._tau[part].abs(), numel, count, self._tau.device
        )
        return max(threshold, smallest)

    def conflict(self) -> Conflict:
        """Give the conflict between the experts so far."""
        parts = [self.total[part] for part in chunks(self.total.numel(), self._device)]
        shared, opposed = self._signs.counts() if self._signs is not None else (0, 0)
        return Conflict(
            has_sign=self._signs is not None,
            shared=shared,
            opposed=opposed,
            total_mass=self._mass,
            common_mass=sum(float(part.abs().sum()) for part in parts),
            total_energy=self._energy,
            common_energy=sum(_energy(part) for part in parts) / max(1, self._experts),
        )


def measure(
    base: Tensor,
    experts: Iterable[Tensor],
    denoise: float,
    device: str = "cpu",
) -> Conflict:
    """Measure the conflict of one weight between two or more experts; `Accumulator` describes the arguments."""
    accumulator = Accumulator(base, denoise, device)
    for expert in experts:
        accumulator.add(expert)
    return accumulator.conflict()


def task_vectors(base: Tensor, experts: Iterable[Tensor], device: str = "cpu") -> Iterator[Tensor]:
    """Compute one task vector θ_t − θ_0 after the other.

    Args:
        base: θ_0, of any shape and floating dtype.
        experts: θ_t, of the base's shape.
        device: the device that computes.

    Yields:
        A float32 tensor of the base's shape; coordinates that are not finite are 0.
    """
    reference = float_on(device, base)
    for expert in experts:
        tau = float_on(device, expert) - reference
        yield tau.nan_to_num_(0.0, 0.0, 0.0)


def _energy(values: Tensor) -> float:
    return float(torch.dot(values, values))


def _complement(part: float, whole: float) -> float:
    return min(1.0, max(0.0, 1.0 - part / whole)) if whole else 0.0
