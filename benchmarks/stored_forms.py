"""The forms in which a fine-tune's change can be stored, ours and others', each as weights and bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, Literal, TypeVar

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
from mergekit_mediator.delta.random_sign import encode_random_sign
from mergekit_mediator.delta.random_sign_costs import density_at, random_sign_tradeoff
from mergekit_mediator.store.codec import encode_bytes

RATES = (0.05, 0.08, 0.15, 0.2, 0.25, 0.5, 1.0, 2.0)
RANKS = (4, 16, 64, 256)
COME_RATES = (0.2, 0.5, 1.0, 2.0)
SIGN_FIRST_RANKS = (4, 16)
DENSITIES = (0.01, 0.05, 0.2, 0.5)
SIGN_SHARES, SIGN_RATES = (0.03, 0.1, 0.3), (0.05, 0.08, 0.15, 0.25, 0.5, 1.0)
SETTING_RATES = (0.08, 0.15, 0.5)
# What counts more of the squared error: nothing, the middle blocks, or small changes.
Weigh = Literal["alike", "middle", "relative"]
SETTINGS: dict[str, dict[str, Any]] = {
    "the middle more": {"weigh": "middle"},
    "the middle more, strengthened by 0": {"weigh": "middle", "norm_power": 0.0},
    "errors relative": {"weigh": "relative"},
    "strengthened by 0": {"norm_power": 0.0},
    "strengthened by 0.75": {"norm_power": 0.75},
}


T = TypeVar("T")


class Change:
    """What a fine-tune changed of its base, with the decompositions that several forms share.

    Attributes:
        numel: the parameters of the weights in which anything changed. All bits are counted for these: an
            embedding that was not trained costs nothing, and must not make a rate look low.
        device: where passes over all weights at once take place. All weights stay on the CPU.
    """

    def __init__(
        self, base: State, expert: State, device: str = "cpu", workers: int | None = None
    ) -> None:
        """Take the difference.

        Args:
            base: all weights of the base, on the CPU.
            expert: those of the fine-tune.
            device: see above.
            workers: threads that decompose and store, weight by weight. Decompositions are made by the device
                without them: many small steps are not worth a device that is busy with others.
        """
        changed = [
            n for n, weight in base.items() if not torch.equal(weight.float(), expert[n].float())
        ]
        self.device, self._workers = device, workers
        self.base = {name: base[name] for name in changed}
        self.expert = {name: expert[name] for name in changed}
        self.differences = {n: expert[n].float() - base[n].float() for n in changed}
        self.numel = sum(difference.numel() for difference in self.differences.values())
        self.matrices = {n: as_matrix(d) for n, d in self.differences.items() if not is_vector(d)}

    def each(self, make: Callable[[str], T], names: Mapping[str, Any]) -> dict[str, T]:
        """Make something of each of these weights."""
        if self._workers is None:
            return {name: make(name) for name in names}
        # the largest first, so that none is begun when all others are done
        order = sorted(names, key=lambda name: -self.differences[name].numel())
        with ThreadPoolExecutor(self._workers) as pool:
            made = dict(zip(order, pool.map(make, order), strict=True))
        return {name: made[name] for name in names}

    def _decomposed(self, matrix: Tensor) -> Decomposition:
        return Decomposition.of(matrix, self.device if self._workers is None else "cpu")

    @cached_property
    def parts(self) -> dict[str, Decomposition]:
        return self.each(lambda name: self._decomposed(self.matrices[name]), self.matrices)

    @cached_property
    def remainders(self) -> dict[str, Decomposition]:
        """The decompositions of what one bit a weight leaves."""

        def left(name: str) -> Decomposition:
            matrix = self.matrices[name]
            return self._decomposed(matrix - peers.one_bit(matrix).approximation)

        return self.each(left, self.matrices)

    @cached_property
    def components(self) -> dict[str, Components]:
        return self.each(lambda name: decompose(self.matrices[name]), self.matrices)

    @cache  # noqa: B019 (a change lives as long as its measurement)
    def factors(self, weigh: Weigh) -> dict[str, float]:
        """The factor of each weight's squared error.

        "middle" gives √2 to the middle block, √½ to the first and the last one, and 1 to what is no block, as merges
        did once. "relative" divides by the mean square of the weight's own change.
        """
        if weigh == "middle":
            layers = {name: layer_of(name) for name in self.differences}
            last = max(1, *(int(layer) for layer in layers.values() if layer.isdigit()))
            return {
                name: 2 ** (0.5 - abs(2 * int(layer) / last - 1)) if layer.isdigit() else 1.0
                for name, layer in layers.items()
            }
        squares = {n: float(d.square().mean()) for n, d in self.differences.items()}
        mean = self.energy / self.numel
        return {n: mean / square if weigh == "relative" else 1.0 for n, square in squares.items()}

    @cache  # noqa: B019
    def costs(self, weigh: Weigh) -> Tensor:
        """The bits of all weights at each slope."""
        components, factors = self.components, self.factors(weigh)

        def bits(name: str) -> Tensor:
            scale, known = factors[name] ** 0.5, components.get(name)
            if known is not None:
                known = replace(known, values=known.values * scale, energy=known.energy * scale**2)
            return tradeoff.tradeoff(self.differences[name] * scale, known)[0]

        return torch.stack(list(self.each(bits, self.differences).values())).sum(0)

    @cached_property
    def energy(self) -> float:
        """The squared norm of the change."""
        return sum(float(d.square().sum(dtype=torch.float64)) for d in self.differences.values())


# The weights as a form gives them back, of those that changed, and bits per parameter.
Form = Callable[[Change], tuple[State, float]]


def forms(only: str = "") -> dict[str, Form]:
    """All forms by name, or those whose names begin as one of these, which commas separate."""
    known: dict[str, Form] = {
        **{f"ours {bits:g}": partial(ours, bits=bits) for bits in RATES},
        **{f"extract-lora {rank}": partial(extracted_lora, rank=rank) for rank in RANKS},
        "one bit": partial(of_matrices, store=lambda c, n: peers.one_bit(c.matrices[n])),
        "two bits": partial(of_matrices, store=lambda c, n: peers.one_bit(c.matrices[n], 2)),
        **{f"8-3-2 bits {bits:g}": partial(come, bits=bits) for bits in COME_RATES},
        **{f"sign first, rank {rank}": partial(sign_first, rank=rank) for rank in SIGN_FIRST_RANKS},
        **{f"random signs {share:g}": partial(random_signs, share=share) for share in SIGN_SHARES},
        **{f"ours as signs {bits:g}": partial(signs_within, bits=bits) for bits in SIGN_RATES},
        **{f"ternary {density:g}": partial(ternary, density=density) for density in DENSITIES},
    }
    return {name: form for name, form in known.items() if begins(name, only)}


def begins(form: str, only: str) -> bool:
    """Whether a form's name begins like one of these, which commas separate."""
    return form.startswith(tuple(only.split(",")))


def settings() -> dict[str, Form]:
    """Our form with other settings: some of the error counts more, and other powers strengthen it."""
    return {
        f"ours {bits:g}, {label}": partial(ours, bits=bits, **changed)
        for bits in SETTING_RATES
        for label, changed in SETTINGS.items()
    }


def ours(
    change: Change, bits: float, norm_power: float = NORM_POWER, weigh: Weigh = "alike"
) -> tuple[State, float]:
    """Low rank plus sparse at one slope, relative to the base, as bytes of an expert's file."""
    slope = tradeoff.slope_for(change.costs(weigh), change.numel, bits)

    def store(name: str) -> tuple[Tensor, int]:
        known, weight = change.components.get(name), change.base[name].clone()
        own = slope / change.factors(weigh)[name]
        difference = change.differences[name]
        stored = approximate(difference, own, weight.dtype, 0.0, known, norm_power)
        mix_(weight, [(1.0, stored)])
        return weight, encode_bytes(stored)[0].numel()

    made = change.each(store, change.differences)
    weights = {name: weight for name, (weight, _) in made.items()}
    return weights, 8 * sum(size for _, size in made.values()) / change.numel


def extracted_lora(change: Change, rank: int) -> tuple[State, float]:
    """Matrices of low rank; what is no matrix stays that of the base, as `mergekit-extract-lora` has it."""
    parts = change.parts
    stored = change.each(lambda name: peers.low_rank(parts[name], rank), parts)
    return _weights(change, stored, vectors=change.base), _rate(change, stored.values())


def of_matrices(change: Change, store: Callable[[Change, str], Stored]) -> tuple[State, float]:
    """Each matrix by itself; what is no matrix is kept in bfloat16."""
    return _kept(change, change.each(lambda name: store(change, name), change.matrices))


def ternary(change: Change, density: float) -> tuple[State, float]:
    matrices = {name: matrix.to(change.device) for name, matrix in change.matrices.items()}
    return _kept(change, peers.ternary(matrices, density))


def random_signs(change: Change, share: float) -> tuple[State, float]:
    """Signs at a share of the coordinates, made larger to stand for the others: `values: random_sign`."""

    def store(c: Change, name: str) -> Stored:
        base = c.base[name]
        stored = encode_random_sign(c.expert[name], base, share)
        return Stored(as_matrix(stored.change(base)), 8 * encode_bytes(stored)[0].numel())

    return of_matrices(change, store)


def signs_within(change: Change, bits: float) -> tuple[State, float]:
    """Random signs at one slope, relative to the base, as `values: random_sign` with `bits` stores them."""
    differences = change.differences
    costs = change.each(lambda n: random_sign_tradeoff(differences[n], 0.0), differences)
    total = torch.stack(list(costs.values())).sum(dim=0)
    slope = tradeoff.slope_for(total[0], change.numel, bits)

    def store(name: str) -> tuple[Tensor, int]:
        weight = change.base[name].clone()
        density = density_at(change.differences[name], slope)
        stored = encode_random_sign(change.expert[name], weight, density)
        mix_(weight, [(1.0, stored)])
        return weight, encode_bytes(stored, change.base[name])[0].numel()

    made = change.each(store, change.differences)
    weights = {name: weight for name, (weight, _) in made.items()}
    return weights, 8 * sum(size for _, size in made.values()) / change.numel


def come(change: Change, bits: float) -> tuple[State, float]:
    parts = change.parts  # made once, before threads ask for them

    def store(c: Change, name: str) -> Stored:
        return peers.by_singular_value(parts[name], bits * c.matrices[name].numel())

    return of_matrices(change, store)


def sign_first(change: Change, rank: int) -> tuple[State, float]:
    remainders = change.remainders
    return of_matrices(change, lambda c, n: peers.sign_first(c.matrices[n], remainders[n], rank))


def _kept(change: Change, stored: dict[str, Stored]) -> tuple[State, float]:
    vectors = sum(d.numel() for n, d in change.differences.items() if n not in stored)
    rate = _rate(change, stored.values()) + HALF * vectors / change.numel
    return _weights(change, stored, vectors=change.expert), rate


def _weights(change: Change, stored: dict[str, Stored], vectors: State) -> State:
    return {
        name: (weight.float() + stored[name].approximation.view_as(weight).cpu()).to(weight.dtype)
        if name in stored
        else vectors[name]
        for name, weight in change.base.items()
    }


def _rate(change: Change, stored: Iterable[Stored]) -> float:
    return sum(one.bits for one in stored) / change.numel
