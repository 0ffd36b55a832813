"""The forms in which a fine-tune's change can be stored, ours and others', each as weights and bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Any

import peers
import torch
from baselines import State
from layer_metrics import layer_of
from peers import HALF, Decomposition, Stored
from torch import Tensor

from mergekit_mediator.delta import tradeoff
from mergekit_mediator.delta.approximate import NORM_POWER, approximate, as_matrix, is_vector
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Components
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.merge.layers import importance
from mergekit_mediator.store.codec import encode_bytes

RATES = (0.05, 0.08, 0.15, 0.2, 0.25, 0.5, 1.0, 2.0)
RANKS = (4, 16, 64, 256)
COME_RATES = (0.2, 0.5, 1.0, 2.0)
SIGN_FIRST_RANKS = (4, 16)
DENSITIES = (0.01, 0.05, 0.2, 0.5)
SETTING_RATES = (0.08, 0.15, 0.5)
SETTINGS: dict[str, dict[str, Any]] = {
    "all blocks alike": {"weighted": False},
    "strengthened by 0": {"norm_power": 0.0},
    "strengthened by 0.75": {"norm_power": 0.75},
}


class Change:
    """What a fine-tune changed of its base, with the decompositions that several forms share.

    Attributes:
        numel: the parameters of the weights in which anything changed. All bits are counted for these: an
            embedding that was not trained costs nothing, and must not make a rate look low.
    """

    def __init__(self, base: State, expert: State, device: str = "cpu") -> None:
        changed = [name for name, weight in base.items() if not torch.equal(weight, expert[name])]
        self._device = device
        self.base = {name: base[name] for name in changed}
        self.expert = {name: expert[name] for name in changed}
        self.differences = {n: expert[n].float() - base[n].float() for n in changed}
        self.numel = sum(difference.numel() for difference in self.differences.values())
        self.matrices = {n: as_matrix(d) for n, d in self.differences.items() if not is_vector(d)}

    @cached_property
    def parts(self) -> dict[str, Decomposition]:
        return {
            name: Decomposition.of(matrix, self._device) for name, matrix in self.matrices.items()
        }

    @cached_property
    def remainders(self) -> dict[str, Decomposition]:
        """The decompositions of what one bit a weight leaves."""
        return {
            name: Decomposition.of(matrix - peers.one_bit(matrix).approximation, self._device)
            for name, matrix in self.matrices.items()
        }

    @cached_property
    def components(self) -> dict[str, Components]:
        return {name: decompose(matrix) for name, matrix in self.matrices.items()}

    @cached_property
    def importance(self) -> dict[str, float]:
        """The factor of each weight's squared error, as a merge weighs its layer."""
        layers = {name: layer_of(name) for name in self.differences}
        factors = importance(layers.values())
        return {name: factors[layer] for name, layer in layers.items()}

    @cache  # noqa: B019 (a change lives as long as its measurement)
    def costs(self, weighted: bool) -> Tensor:
        """The bits of all weights at each slope."""
        total = torch.zeros(len(tradeoff.SLOPES), dtype=torch.float64)
        for name, difference in self.differences.items():
            factor = self.importance[name] if weighted else 1.0
            total += tradeoff.tradeoff(difference, self.components.get(name), factor)[0]
        return total


# The weights as a form gives them back, of those that changed, and bits per parameter.
Form = Callable[[Change], tuple[State, float]]


def forms(only: str = "") -> dict[str, Form]:
    """All forms by name, or those whose names begin as one of these, which commas separate."""
    known: dict[str, Form] = {
        **{f"ours {bits:g}": partial(ours, bits=bits) for bits in RATES},
        **{f"extract-lora {rank}": partial(extracted_lora, rank=rank) for rank in RANKS},
        "one bit": partial(of_matrices, store=lambda c, n: peers.one_bit(c.matrices[n])),
        "two bits": partial(of_matrices, store=lambda c, n: peers.one_bit(c.matrices[n], 2)),
        **{f"8-3-2 bits {bits:g}": partial(of_matrices, store=come(bits)) for bits in COME_RATES},
        **{
            f"sign first, rank {rank}": partial(of_matrices, store=sign_first(rank))
            for rank in SIGN_FIRST_RANKS
        },
        **{f"ternary {density:g}": partial(ternary, density=density) for density in DENSITIES},
    }
    return {name: form for name, form in known.items() if begins(name, only)}


def begins(form: str, only: str) -> bool:
    """Whether a form's name begins like one of these, which commas separate."""
    return form.startswith(tuple(only.split(",")))


def settings() -> dict[str, Form]:
    """Our form with other settings: without weighing the middle more, and strengthened by other powers."""
    return {
        f"ours {bits:g}, {label}": partial(ours, bits=bits, **changed)
        for bits in SETTING_RATES
        for label, changed in SETTINGS.items()
    }


def ours(
    change: Change, bits: float, norm_power: float = NORM_POWER, weighted: bool = True
) -> tuple[State, float]:
    """Low rank plus sparse at one slope, relative to the base, as bytes of an expert's file."""
    slope = tradeoff.slope_for(change.costs(weighted), change.numel, bits)
    weights, stored_bytes = {}, 0
    for name, difference in change.differences.items():
        known, dtype = change.components.get(name), change.base[name].dtype
        own = slope / change.importance[name] if weighted else slope
        stored = approximate(difference, own, dtype, 0.0, known, norm_power)
        stored_bytes += encode_bytes(stored)[0].numel()
        weights[name] = change.base[name].clone()
        mix_(weights[name], [(1.0, stored)])
    return weights, 8 * stored_bytes / change.numel


def extracted_lora(change: Change, rank: int) -> tuple[State, float]:
    """Matrices of low rank; what is no matrix stays that of the base, as `mergekit-extract-lora` has it."""
    stored = {name: peers.low_rank(parts, rank) for name, parts in change.parts.items()}
    return _weights(change, stored, vectors=change.base), _rate(change, stored.values())


def of_matrices(change: Change, store: Callable[[Change, str], Stored]) -> tuple[State, float]:
    """Each matrix by itself; what is no matrix is kept in bfloat16."""
    return _kept(change, {name: store(change, name) for name in change.matrices})


def ternary(change: Change, density: float) -> tuple[State, float]:
    return _kept(change, peers.ternary(change.matrices, density))


def come(bits: float) -> Callable[[Change, str], Stored]:
    return lambda c, n: peers.by_singular_value(c.parts[n], bits * c.matrices[n].numel())


def sign_first(rank: int) -> Callable[[Change, str], Stored]:
    return lambda c, n: peers.sign_first(c.matrices[n], c.remainders[n], rank)


def _kept(change: Change, stored: dict[str, Stored]) -> tuple[State, float]:
    vectors = sum(d.numel() for n, d in change.differences.items() if n not in stored)
    rate = _rate(change, stored.values()) + HALF * vectors / change.numel
    return _weights(change, stored, vectors=change.expert), rate


def _weights(change: Change, stored: dict[str, Stored], vectors: State) -> State:
    return {
        name: (weight.float() + stored[name].approximation.view_as(weight)).to(weight.dtype)
        if name in stored
        else vectors[name]
        for name, weight in change.base.items()
    }


def _rate(change: Change, stored: Iterator[Stored]) -> float:
    return sum(one.bits for one in stored) / change.numel
