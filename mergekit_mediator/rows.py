"""The rows form: every row of a batch with a mixture of its own, without touching the weights.

In a routed layer `y_b = x_b W' + Σ_t c_bt (x_b D_t')`, where D_t is what expert t adds to the dense
weight W and c_bt its weight in the row's mixture (see `sparse.mix_` for experts relative to the base).
Each expert is applied once per layer, to its rows together; low-rank parts of all experts are one pair
of thin products. Costs grow with the experts in use, and there is nothing to enter or leave.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.mixture import Mixer, Mixture
from mergekit_mediator.sparse import SparseTensor

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# From this density on, a sparse product takes longer than a dense one.
_DENSE_FROM = 0.35


@dataclass(frozen=True)
class _Place:
    """A module that uses a routed weight."""

    module: nn.Module
    parameter: str


@dataclass(frozen=True)
class _Term:
    """The sparse part of one expert in one weight, for its rows.

    rows: of the batch, as a slice where they follow each other.
    coefficients: `[n]` float32, or None where all are 1.
    matrix: `[out, in]`.
    """

    rows: Tensor | slice
    coefficients: Tensor | None
    matrix: Tensor


class Rows:
    """Applies one mixture per row to the modules of a model, by hooks."""

    def __init__(self, model: nn.Module, mixer: Mixer) -> None:
        self._model, self._mixer = model, mixer

    def obstacle(self) -> str | None:
        """The first routed weight that this form cannot serve, with its module's class; None if none."""
        return self._plan()[1]

    @contextmanager
    def applied(self, rows: tuple[Mixture, ...]) -> Iterator[None]:
        """Inside, row b of every batch has mixture b; of larger batches, rows follow each other in
        groups of equal size, as beams and returned sequences do.

        Raises:
            MixtureError: a routed weight that this form cannot serve.
        """
        plan, obstacle = self._plan()
        if obstacle is not None:
            raise MixtureError(
                f"apply='rows' cannot serve {obstacle}: use apply='merge', which runs the rows of "
                "each mixture together"
            )
        with self._mixer.hold(rows), ExitStack() as stack:
            weights = self._mixer.weights
            for name, places in plan.items():
                parts = self._parts(name, weights[name], rows)
                if parts:
                    for place, kind in places:
                        stack.callback(kind(place, weights[name], parts, len(rows)))
            yield

    def _plan(self) -> tuple[dict[str, list[tuple[_Place, "_Kind"]]], str | None]:
        """How each module that uses a routed weight is served, and what cannot be."""
        plan: dict[str, list[tuple[_Place, _Kind]]] = {}
        for name, places in self._places().items():
            if not places:
                return plan, f"{name}, which is part of a larger weight"
            plan[name] = []
            for place in places:
                kind = _kind(place)
                if kind is None:
                    return plan, f"{name} in {type(place.module).__name__}"
                plan[name].append((place, kind))
        return plan, None

    def _places(self) -> dict[str, list[_Place]]:
        """The modules that use each routed weight; a tied weight has several."""
        users: dict[tuple[int, torch.Size], list[_Place]] = {}
        for module in self._model.modules():
            for parameter, value in module.named_parameters(recurse=False, remove_duplicate=False):
                key = (value.data_ptr(), value.shape)
                users.setdefault(key, []).append(_Place(module, parameter))
        return {
            name: users.get((weight.data_ptr(), weight.shape), [])
            for name, weight in self._mixer.weights.items()
        }

    def _parts(self, name: str, weight: Tensor, rows: tuple[Mixture, ...]) -> "_Parts":
        """The experts that change a weight, each with its coefficients for the rows."""
        found: dict[str, tuple[SparseTensor, list[float]]] = {}
        for row, mixture in enumerate(rows):
            parts = self._mixer.parts(name, mixture)
            total = sum(p for _, p, _ in parts)
            for expert, p, stored in parts:
                _, coefficients = found.setdefault(expert, (stored, [0.0] * len(rows)))
                coefficients[row] = p - stored.share * total
        return [
            _Part(
                stored,
                torch.tensor(coefficients, device=weight.device),
                partial(self._matrix, expert, name, weight, stored),
            )
            for expert, (stored, coefficients) in found.items()
            if stored.positions.numel() or stored.factors
        ]

    def _matrix(self, expert: str, name: str, weight: Tensor, stored: SparseTensor) -> Tensor:
        key = ("matrix", expert, name)
        return self._mixer.remember(key, stored, lambda: _matrix(weight, stored))


@dataclass(frozen=True)
class _Part:
    """What one expert adds to one weight.

    coefficients: `[batch]` float32.
    matrix: gives the sparse part `[out, in]`: CSR in float32, or dense in the weight's dtype.
    """

    stored: SparseTensor
    coefficients: Tensor
    matrix: Callable[[], Tensor]


_Parts = list[_Part]
_Undo = Callable[[], None]
_Kind = Callable[[_Place, Tensor, _Parts, int], _Undo]


def _kind(place: _Place) -> _Kind | None:
    """How a module is given rows of its own, or None if it cannot."""
    forward = type(place.module).forward
    if forward is nn.Linear.forward:
        return _linear if place.parameter == "weight" else _bias
    if forward is nn.Embedding.forward:
        return _embedding
    # elementwise scales broadcast over rows; torch's fused norms do not take one per row
    if type(place.module).__name__.endswith("RMSNorm") and not isinstance(place.module, nn.RMSNorm):
        return _scale
    return None


def _linear(place: _Place, weight: Tensor, parts: _Parts, batch: int) -> _Undo:
    terms = _terms(parts)
    thin = _thin(weight, parts)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        repeat = _repeat(x, batch)
        for term in terms:
            rows = _expand(term.rows, repeat)
            part = x[rows]
            if term.matrix.layout is torch.sparse_csr:
                flat = part.reshape(-1, part.shape[-1]).to(torch.float32)
                y = (term.matrix @ flat.T).T.reshape(*part.shape[:-1], -1)
            else:
                y = part @ term.matrix.T
            if term.coefficients is not None:
                y = y * _column(term.coefficients, repeat, y)
            if isinstance(rows, slice):
                output[rows] += y
            else:
                output.index_add_(0, rows, y.to(output.dtype))
        if thin is not None:
            right, left, scales = thin
            z = (x @ right) * _column(scales, repeat, x)
            output += z @ left.T
        return output

    return place.module.register_forward_hook(hook).remove


def _bias(place: _Place, weight: Tensor, parts: _Parts, batch: int) -> _Undo:
    added = _row_weights(weight, parts, batch) - weight.to(torch.float32)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + _column(added, _repeat(output, batch), output).to(output.dtype)

    return place.module.register_forward_hook(hook).remove


def _embedding(place: _Place, weight: Tensor, parts: _Parts, batch: int) -> _Undo:
    flat = weight.view(-1)
    prepared = []
    for part in parts:
        stored, positions = part.stored, part.stored.positions.to(torch.int64)
        values = stored.difference(flat[positions])
        prepared.append((stored, part.coefficients, positions, values))

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = args[0]
        tokens, place_of = torch.unique(ids, return_inverse=True)
        result = output.to(torch.float32)
        for stored, coefficients, positions, values in prepared:
            table = _table(stored, positions, values, tokens)
            result = result + table[place_of] * _column(coefficients, _repeat(ids, batch), result)
        return result.to(output.dtype)

    return place.module.register_forward_hook(hook).remove


def _scale(place: _Place, weight: Tensor, parts: _Parts, batch: int) -> _Undo:
    rows = _row_weights(weight, parts, batch).to(weight.dtype)
    module, own = place.module, place.module._parameters[place.parameter]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value: Any = _column(rows, _repeat(args[0], batch), args[0])
        module._parameters[place.parameter] = value

    handle = module.register_forward_pre_hook(hook)

    def undo() -> None:
        handle.remove()
        module._parameters[place.parameter] = own

    return undo


def _terms(parts: _Parts) -> list[_Term]:
    """The sparse parts as matrices."""
    terms = []
    for part in parts:
        rows = part.coefficients.nonzero()[:, 0]
        if part.stored.positions.numel() and rows.numel():
            first, last = int(rows[0]), int(rows[-1])
            together = last - first + 1 == rows.numel()
            coefficients = part.coefficients[rows]
            terms.append(
                _Term(
                    slice(first, last + 1) if together else rows,
                    None if bool((coefficients == 1).all()) else coefficients,
                    part.matrix(),
                )
            )
    return terms


def _matrix(weight: Tensor, stored: SparseTensor) -> Tensor:
    positions = stored.positions.to(torch.int64)
    values = stored.difference(weight.view(-1)[positions])
    out, width = weight.shape
    if positions.numel() >= _DENSE_FROM * weight.numel():
        dense = torch.zeros(out * width, dtype=torch.float32, device=weight.device)
        return dense.index_copy_(0, positions, values).view(out, width).to(weight.dtype)
    starts = torch.arange(out + 1, device=positions.device) * width
    first = torch.searchsorted(positions, starts)
    return torch.sparse_csr_tensor(
        first.to(torch.int32),
        (positions % width).to(torch.int32),
        values,
        (out, width),
        check_invariants=False,
    )


def _thin(weight: Tensor, parts: _Parts) -> tuple[Tensor, Tensor, Tensor] | None:
    """All experts' factors side by side: `[in, Σr]`, `[out, Σr]`, and `[batch, Σr]` of scales."""
    factored = [(p.stored.factors, p.coefficients) for p in parts if p.stored.factors]
    if not factored:
        return None
    right = torch.cat([f.right.to(weight.dtype) for f, _ in factored], dim=1)
    left = torch.cat([f.left.to(weight.dtype) for f, _ in factored], dim=1)
    scales = torch.cat([c[:, None] * f.scales for f, c in factored], dim=1)
    return right, left, scales


def _row_weights(weight: Tensor, parts: _Parts, batch: int) -> Tensor:
    """A small weight for each row, `[batch, *shape]` float32, summed as `sparse.mix_` does."""
    flat = weight.reshape(-1)
    rows = flat.to(torch.float32).repeat(batch, 1)
    for part in parts:
        stored, coefficients = part.stored, part.coefficients
        positions = stored.positions.to(torch.int64)
        rows[:, positions] += coefficients[:, None] * stored.difference(flat[positions])
        if stored.factors:
            rows += coefficients[:, None] * stored.factors.product().reshape(-1)
    return rows.view(batch, *weight.shape)


def _table(stored: SparseTensor, positions: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """What an expert adds to some rows of an embedding, `[tokens, hidden]` float32."""
    width = stored.shape[-1]
    first = torch.searchsorted(positions, tokens * width)
    last = torch.searchsorted(positions, (tokens + 1) * width)
    counts = last - first
    place = torch.arange(len(tokens), device=tokens.device).repeat_interleave(counts)
    skipped = (first - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    taken = torch.arange(place.numel(), device=tokens.device) + skipped
    table = torch.zeros(len(tokens), width, device=tokens.device)
    table[place, positions[taken] % width] = values[taken]
    factors = stored.factors
    if factors is not None:
        left = factors.left[tokens].to(torch.float32) * factors.scales
        table += left @ factors.right.to(torch.float32).T
    return table


def _repeat(x: Tensor, batch: int) -> int:
    """How many rows of an input belong to each row of the batch."""
    repeat, rest = divmod(x.shape[0], batch)
    if rest or not repeat:
        raise MixtureError(
            f"apply='rows': {batch} rows have mixtures, but a module got {x.shape[0]}: use "
            "apply='merge'"
        )
    return repeat


def _expand(rows: Tensor | slice, repeat: int) -> Tensor | slice:
    if repeat == 1:
        return rows
    if isinstance(rows, slice):
        return slice(rows.start * repeat, rows.stop * repeat)
    return (rows[:, None] * repeat + torch.arange(repeat, device=rows.device)).view(-1)


def _column(values: Tensor, repeat: int, like: Tensor) -> Tensor:
    """Values `[batch, ...]` of the batch's rows, shaped to scale `like` `[rows, ..., features]`."""
    values = values.repeat_interleave(repeat, dim=0) if repeat > 1 else values
    if values.ndim == 1:
        values = values[:, None]
    between = [1] * (like.ndim - values.ndim)
    return values.view(values.shape[0], *between, *values.shape[1:]).to(like.dtype)
