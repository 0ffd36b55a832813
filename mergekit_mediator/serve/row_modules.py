"""Give a module that uses a routed weight another weight for every row of a batch.

Each kind of module has one function. It prepares the changes of the experts in use, and returns the hook that
adds them. In a larger batch than prepared, each row is a group of consecutive rows of equal size.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.hooks import Hook
from mergekit_mediator.serve.sparse_rows import Products, SparseRows, served

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

Matrix = Tensor | SparseRows

# From this density on, a sparse product takes longer than a dense one.
_DENSE_FROM = 0.35
# MKL's sparse product takes half as much longer if its number of columns is no multiple of `_COLUMNS`. With
# `_TOGETHER` columns it takes no longer than with half as many.
_COLUMNS, _TOGETHER = 4, 8


@dataclass(frozen=True)
class Place:
    """A module that uses a routed weight.

    Attributes:
        module: the module.
        parameter: the name of the weight in the module.
    """

    module: nn.Module
    parameter: str


@dataclass(frozen=True)
class Part:
    """The change that one expert makes to one weight.

    Attributes:
        stored: the stored weight.
        numbers: the expert's coefficient for each row.
        coefficients: the same, `[batch]` float32 on the weight's device.
        matrix: returns the sparse part `[out, in]`: for the kernels of CUDA if they serve the weight, else CSR
            in float32; or dense in the weight's dtype.
    """

    stored: StoredWeight
    numbers: list[float]
    coefficients: Tensor
    matrix: Callable[[], Matrix]


Parts = list[Part]
Kind = Callable[[Place, Tensor, Parts, int], Hook]


@dataclass(frozen=True)
class _Term:
    """The sparse part of one expert in one weight, and the rows of the batch that use the expert.

    Attributes:
        rows: the n rows; a slice if they are consecutive.
        coefficients: the coefficients of these rows, `[n]` float32; None if all are 1.
        part: what is known of all rows of the batch.
        matrix: `[out, in]`.
    """

    rows: Tensor | slice
    coefficients: Tensor | None
    part: Part
    matrix: Matrix


def kind_of(place: Place) -> Kind | None:
    """Return the function that serves a kind of module in rows, or None if there is none."""
    forward = type(place.module).forward
    if forward is nn.Linear.forward:
        return _linear if place.parameter == "weight" else _bias
    if forward is nn.Embedding.forward:
        return _embedding
    # Elementwise scales broadcast over rows. The fused norm of torch takes one scale for all rows.
    if type(place.module).__name__.endswith("RMSNorm") and not isinstance(place.module, nn.RMSNorm):
        return _scale
    return None


def sparse_matrix(weight: Tensor, stored: StoredWeight) -> Matrix:
    """Return the sparse part of an expert's change of a weight `[out, in]`; see `Part.matrix`."""
    positions = stored.positions.to(torch.int64)
    values = stored.difference(weight.view(-1)[positions])
    out, width = weight.shape
    if positions.numel() >= _DENSE_FROM * weight.numel():
        dense = torch.zeros(out * width, dtype=torch.float32, device=weight.device)
        return dense.index_copy_(0, positions, values).view(out, width).to(weight.dtype)
    if served(weight):
        return SparseRows.of(weight, positions, values)
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
    products, others = _products(terms)
    thin = _thin(weight, parts)
    csr = [(term.matrix, term.part.coefficients) for term in terms if _is_csr(term.matrix)]
    together = bool(terms) and len(csr) == len(terms)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        repeat = _repeat(x, batch)
        if together and len(terms) < x[..., 0].numel() <= _TOGETHER:
            _add_together_(output, x, csr)
        else:
            one_by_one = terms
            if products is not None and products.serve(output, x):
                products.add_(output, x)
                one_by_one = others
            for term in one_by_one:
                _add_(output, x, term, repeat)
        if thin is not None:
            right, left, scales = thin
            z = linear(x, right) * _column(scales, repeat, x)
            output.view(-1, output.shape[-1]).addmm_(z.view(-1, z.shape[-1]), left)
        return output

    return Hook(place.module, hook)


def _bias(place: Place, weight: Tensor, parts: Parts, batch: int) -> Hook:
    changes = _row_weights(weight, parts, batch) - weight.to(torch.float32)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + _column(changes, _repeat(output, batch), output).to(output.dtype)

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
    module, dense = place.module, place.module._parameters[place.parameter]

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value: Any = _column(rows, _repeat(args[0], batch), args[0])
        module._parameters[place.parameter] = value

    def reset() -> None:
        module._parameters[place.parameter] = dense

    return Hook(module, hook, before=True, reset=reset)


def _add_together_(output: Tensor, x: Tensor, terms: list[tuple[Tensor, Tensor]]) -> None:
    """Add each expert's sparse product with all rows; rows that do not use the expert are scaled by 0.

    Args:
        output: of the module.
        x: its input.
        terms: by expert, its CSR matrix and its coefficients for all rows of the batch.
    """
    columns = x.reshape(-1, x.shape[-1]).T.to(torch.float32)
    tokens = columns.shape[1]
    change = columns.new_zeros(output.shape[-1], tokens)
    for matrix, coefficients in terms:
        scale = coefficients.repeat_interleave(tokens // len(coefficients))
        change.addmm_(matrix, columns * scale)
    output += change.T.reshape(output.shape)


def _add_(output: Tensor, x: Tensor, term: _Term, repeat: int) -> None:
    """Add an expert's product with the rows that use the expert."""
    rows = _expand(term.rows, repeat)
    part = x[rows]
    if isinstance(term.matrix, SparseRows):
        y = torch.cat([part @ block.T for block in term.matrix.dense()], dim=-1)
    elif _is_csr(term.matrix):
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
    """Multiply `[n, in]` by a transposed CSR matrix `[out, in]`: `[n, out]` float32."""
    count = len(x)
    if count == 1:
        return (matrix @ x[0].to(torch.float32))[None]
    padded = -(-count // _COLUMNS) * _COLUMNS
    columns = torch.zeros(x.shape[1], padded, device=x.device)
    columns[:, :count] = x.T
    product: Tensor = matrix @ columns
    return product[:, :count].T


def _is_csr(matrix: Matrix) -> TypeGuard[Tensor]:
    return isinstance(matrix, Tensor) and matrix.layout is torch.sparse_csr


def _products(terms: list[_Term]) -> tuple[Products | None, list[_Term]]:
    """Put the terms together that a kernel serves; None if there are none. The others are returned."""
    matrices, rows, others = [], [], []
    for term in terms:
        if isinstance(term.matrix, SparseRows):
            matrices.append(term.matrix)
            rows.append(term.part.numbers)
        else:
            others.append(term)
    return Products(matrices, rows) if matrices else None, others


def _terms(parts: Parts) -> list[_Term]:
    """Make a matrix of each sparse part that some row uses."""
    terms = []
    for part in parts:
        rows = [row for row, number in enumerate(part.numbers) if number]
        if not rows or not part.stored.positions.numel():
            continue
        first, last = rows[0], rows[-1]
        consecutive = last - first + 1 == len(rows)
        index = (
            slice(first, last + 1)
            if consecutive
            else torch.tensor(rows, device=part.coefficients.device)
        )
        scaled = any(part.numbers[row] != 1 for row in rows)
        coefficients = part.coefficients[index] if scaled else None
        terms.append(_Term(index, coefficients, part, part.matrix()))
    return terms


def _thin(weight: Tensor, parts: Parts) -> tuple[Tensor, Tensor, Tensor] | None:
    """Put the factors of all experts side by side, in the weight's dtype; None if no expert has factors.

    Returns:
        Right factors `[Σr, in]`, left factors `[Σr, out]`, and scales `[batch, Σr]`.
    """
    low_rank = [(p.stored.factors, p.coefficients) for p in parts if p.stored.factors]
    if not low_rank:
        return None
    rights, lefts, scales = [], [], []
    for factors, coefficients in low_rank:
        left, right, scale = factors.left, factors.right, factors.scales
        if (
            left.dtype == torch.int8
        ):  # both sides share the scale, so products stay in float16's range
            root = scale.abs().sqrt()
            left, right, scale = left * root, right * root, scale.sign()
        lefts.append(left.to(weight.dtype))
        rights.append(right.to(weight.dtype))
        scales.append(coefficients[:, None] * scale)
    right, left = torch.cat(rights, dim=1), torch.cat(lefts, dim=1)
    return right.T, left.T, torch.cat(scales, dim=1).to(weight.dtype)


def _row_weights(weight: Tensor, parts: Parts, batch: int) -> Tensor:
    """Sum a small weight for each row as `mixing.mix_` does: `[batch, *shape]` float32."""
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
    """Return an expert's change of an embedding's rows of some tokens, `[tokens, hidden]` float32.

    Args:
        stored: the stored weight.
        positions: its positions, int64.
        values: its changes at these positions, float32.
        tokens: the tokens, in order.
    """
    width = stored.shape[-1]
    first = torch.searchsorted(positions, tokens * width)
    last = torch.searchsorted(positions, (tokens + 1) * width)
    counts = last - first
    place = torch.arange(len(tokens), device=tokens.device).repeat_interleave(counts)
    offset = (first - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    index = torch.arange(place.numel(), device=tokens.device) + offset
    table = torch.zeros(len(tokens), width, device=tokens.device)
    table[place, positions[index] % width] = values[index]
    factors = stored.factors
    if factors is not None:
        left = factors.left[tokens].to(torch.float32) * factors.scales
        table += left @ factors.right.to(torch.float32).T
    return table


def _repeat(x: Tensor, batch: int) -> int:
    """Count the rows of an input that belong to each row of the batch."""
    repeat, rest = divmod(x.shape[0], batch)
    if rest or not repeat:
        raise MixtureError(
            f"apply='rows': {batch} rows have mixtures, but a module got {x.shape[0]} rows: use "
            "apply='merge'"
        )
    return repeat


def _expand(rows: Tensor | slice, repeat: int) -> Tensor | slice:
    if repeat == 1:
        return rows
    if isinstance(rows, slice):
        return slice(rows.start * repeat, rows.stop * repeat)
    return (rows[:, None] * repeat + torch.arange(repeat, device=rows.device)).view(-1)


def _column(values: Tensor, repeat: int, x: Tensor) -> Tensor:
    """Shape values `[batch, ...]` of the batch's rows to scale `x` `[rows, ..., features]`."""
    if repeat > 1 and len(values) > 1:
        values = values.repeat_interleave(repeat, dim=0)
    if values.ndim == 1:
        values = values[:, None]
    between = [1] * (x.ndim - values.ndim)
    return values.view(values.shape[0], *between, *values.shape[1:]).to(x.dtype)
