"""How a module that uses a routed weight is given a weight of its own for every row of a batch.

One function for each kind of module. It prepares what the experts in use add, and gives the hook that adds
it. Larger batches than prepared for have groups of equal size, in order.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.hooks import Hook

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# From this density on, a sparse product takes longer than a dense one.
_DENSE_FROM = 0.35
# MKL's sparse products take half as much longer where the number of columns is not a multiple of this;
# and one with this many columns takes no longer than one with half as many.
_COLUMNS, _TOGETHER = 4, 8


@dataclass(frozen=True)
class Place:
    """A module that uses a routed weight, as this parameter."""

    module: nn.Module
    parameter: str


@dataclass(frozen=True)
class Part:
    """What one expert adds to one weight.

    coefficients: `[batch]` float32.
    matrix: gives the sparse part `[out, in]`: CSR in float32, or dense in the weight's dtype.
    """

    stored: StoredWeight
    coefficients: Tensor
    matrix: Callable[[], Tensor]


Parts = list[Part]
Kind = Callable[[Place, Tensor, Parts, int], Hook]


@dataclass(frozen=True)
class _Term:
    """The sparse part of one expert in one weight, for its rows.

    rows: of the batch, as a slice where they follow each other.
    coefficients: `[n]` float32 of these rows, or None where all are 1.
    everyone: `[batch]` float32, the coefficients of all rows.
    matrix: `[out, in]`.
    """

    rows: Tensor | slice
    coefficients: Tensor | None
    everyone: Tensor
    matrix: Tensor


def kind_of(place: Place) -> Kind | None:
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


def sparse_matrix(weight: Tensor, stored: StoredWeight) -> Tensor:
    """The sparse part of an expert's change of a weight `[out, in]`; see `Part`."""
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


def _linear(place: Place, weight: Tensor, parts: Parts, batch: int) -> Hook:
    terms = _terms(parts)
    thin = _thin(weight, parts)
    all_sparse = all(term.matrix.layout is torch.sparse_csr for term in terms)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        repeat = _repeat(x, batch)
        if all_sparse and len(terms) < x[..., 0].numel() <= _TOGETHER:
            _add_together_(output, x, terms)
        else:
            for term in terms:
                _add_(output, x, term, repeat)
        if thin is not None:
            right, left, scales = thin
            z = linear(x, right) * _column(scales, repeat, x)
            output.view(-1, output.shape[-1]).addmm_(z.view(-1, z.shape[-1]), left)
        return output

    return Hook(place.module, hook)


def _bias(place: Place, weight: Tensor, parts: Parts, batch: int) -> Hook:
    added = _row_weights(weight, parts, batch) - weight.to(torch.float32)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + _column(added, _repeat(output, batch), output).to(output.dtype)

    return Hook(place.module, hook)


def _embedding(place: Place, weight: Tensor, parts: Parts, batch: int) -> Hook:
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

    return Hook(place.module, hook)


def _scale(place: Place, weight: Tensor, parts: Parts, batch: int) -> Hook:
    rows = _row_weights(weight, parts, batch).to(weight.dtype)
    module, own = place.module, place.module._parameters[place.parameter]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value: Any = _column(rows, _repeat(args[0], batch), args[0])
        module._parameters[place.parameter] = value

    def reset() -> None:
        module._parameters[place.parameter] = own

    return Hook(module, hook, before=True, reset=reset)


def _add_together_(output: Tensor, x: Tensor, terms: list[_Term]) -> None:
    """Add the sparse products of all experts with all rows, few as they are; what is not an expert's
    row is zero there."""
    columns = x.reshape(-1, x.shape[-1]).T.to(torch.float32)
    tokens = columns.shape[1]
    added = columns.new_zeros(output.shape[-1], tokens)
    for term in terms:
        scale = term.everyone.repeat_interleave(tokens // len(term.everyone))
        added.addmm_(term.matrix, columns * scale)
    output += added.T.reshape(output.shape)


def _add_(output: Tensor, x: Tensor, term: _Term, repeat: int) -> None:
    """Add an expert's product with its own rows."""
    rows = _expand(term.rows, repeat)
    part = x[rows]
    if term.matrix.layout is torch.sparse_csr:
        flat = part.reshape(-1, part.shape[-1])
        y = _sparse_product(term.matrix, flat).reshape(*part.shape[:-1], -1)
    else:
        y = part @ term.matrix.T
    if term.coefficients is not None:
        y = y * _column(term.coefficients, repeat, y)
    if isinstance(rows, slice):
        output[rows] += y
    else:
        output.index_add_(0, rows, y.to(output.dtype))


def _sparse_product(matrix: Tensor, x: Tensor) -> Tensor:
    """`[n, in]` times a CSR matrix `[out, in]`, transposed: `[n, out]` float32."""
    count = len(x)
    if count == 1:
        return (matrix @ x[0].to(torch.float32))[None]
    padded = -(-count // _COLUMNS) * _COLUMNS
    columns = torch.zeros(x.shape[1], padded, device=x.device)
    columns[:, :count] = x.T
    product: Tensor = matrix @ columns
    return product[:, :count].T


def _terms(parts: Parts) -> list[_Term]:
    """The sparse parts as matrices."""
    terms = []
    for part in parts:
        if not part.stored.positions.numel():
            continue
        rows = part.coefficients.nonzero()[:, 0]
        if rows.numel():
            first, last = int(rows[0]), int(rows[-1])
            together = last - first + 1 == rows.numel()
            coefficients = part.coefficients[rows]
            terms.append(
                _Term(
                    slice(first, last + 1) if together else rows,
                    None if bool((coefficients == 1).all()) else coefficients,
                    part.coefficients,
                    part.matrix(),
                )
            )
    return terms


def _thin(weight: Tensor, parts: Parts) -> tuple[Tensor, Tensor, Tensor] | None:
    """All experts' factors side by side: `[Σr, in]`, `[Σr, out]`, and `[batch, Σr]` of scales, in the
    dtype of the weight."""
    factored = [(p.stored.factors, p.coefficients) for p in parts if p.stored.factors]
    if not factored:
        return None
    rights, lefts, scales = [], [], []
    for factors, coefficients in factored:
        left, right, own = factors.left, factors.right, factors.scales
        if left.dtype == torch.int8:  # between the two, so that no product leaves float16's range
            root = own.abs().sqrt()
            left, right, own = left * root, right * root, own.sign()
        lefts.append(left.to(weight.dtype))
        rights.append(right.to(weight.dtype))
        scales.append(coefficients[:, None] * own)
    right, left = torch.cat(rights, dim=1), torch.cat(lefts, dim=1)
    return right.T, left.T, torch.cat(scales, dim=1).to(weight.dtype)


def _row_weights(weight: Tensor, parts: Parts, batch: int) -> Tensor:
    """A small weight for each row, `[batch, *shape]` float32, summed as `stored_weight.mix_` does."""
    flat = weight.reshape(-1)
    rows = flat.to(torch.float32).repeat(batch, 1)
    for part in parts:
        stored, coefficients = part.stored, part.coefficients
        positions = stored.positions.to(torch.int64)
        rows[:, positions] += coefficients[:, None] * stored.difference(flat[positions])
        if stored.factors:
            rows += coefficients[:, None] * stored.factors.product().reshape(-1)
    return rows.view(batch, *weight.shape)


def _table(stored: StoredWeight, positions: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
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
    if repeat > 1 and len(values) > 1:
        values = values.repeat_interleave(repeat, dim=0)
    if values.ndim == 1:
        values = values[:, None]
    between = [1] * (like.ndim - values.ndim)
    return values.view(values.shape[0], *between, *values.shape[1:]).to(like.dtype)
