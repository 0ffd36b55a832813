"""The sparse parts of experts on CUDA: a compact form, and one kernel for all experts that use a weight.

cuSPARSE takes several kernels for each expert, and most of a decoding step goes by in launching them. For few
tokens, one kernel of `sparse_kernels` sums the products of all experts in float32, and rounds once as it adds them to
the output. For many tokens, the dense product of a matrix that is filled for the moment is faster.

Where there is no CUDA or no Triton, `sparse_matrix` in `row_modules` makes torch's CSR matrices instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# From this number of tokens on, filling dense matrices takes less time than gathering the inputs of each value.
_MANY_TOKENS = 65
# Widths up to here have columns in int16.
_SHORT_WIDTH = 2**15
# Values are scaled by a power of 2 to magnitudes below 2^15: float16 then has 11 bits of each value that is larger
# than 2^-29 of the largest.
_LARGEST_EXPONENT = 15
_BLOCK, _TILE, _WARPS = 256, 2048, 2  # stored values, and inputs, that one program reads at once
_DENSE_NUMBERS = 2**27  # of a matrix that is filled for the moment, at once


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix by rows, of 4 bytes per value in weights of 16 bits: its values are `scale * values`.

    Attributes:
        shape: `(out, in)`.
        first: where each row starts, `[out + 1]` int64.
        columns: `[k]`, int16 if they fit, else int32.
        values: `[k]`, float16 if the weight has 16 bits, else float32.
        scale: `[1]` float32.
        dtype: of the weight.
    """

    shape: tuple[int, int]
    first: Tensor
    columns: Tensor
    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, positions: Tensor, values: Tensor) -> "SparseRows":
        """Round the values, relatively to 2^-12 of each, if the weight has 16 bits.

        Args:
            weight: the dense weight, `[out, in]`.
            positions: `[k]` int64, flat and ascending.
            values: `[k]` float32.
        """
        out, width = weight.shape
        starts = torch.arange(out + 1, device=positions.device) * width
        scale = torch.ones(1, device=positions.device)
        if weight.dtype != torch.float32:
            largest = values.abs().amax() if values.numel() else scale
            exponent = torch.frexp(largest).exponent.view(1) - _LARGEST_EXPONENT
            scale = torch.ldexp(scale, exponent)
            values = torch.ldexp(values, -exponent).to(torch.float16)
        short = torch.int16 if width <= _SHORT_WIDTH else torch.int32
        return cls(
            (out, width),
            torch.searchsorted(positions, starts),
            (positions % width).to(short),
            values,
            scale,
            weight.dtype,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, those whose addresses the kernel takes."""
        return self.first, self.columns, self.values, self.scale

    def dense(self) -> Iterator[Tensor]:
        """Fill the matrix in the weight's dtype, a block of rows after another."""
        out, width = self.shape
        rows = max(1, _DENSE_NUMBERS // width)
        for begin in range(0, out, rows):
            count = min(rows, out - begin)
            dense = torch.zeros(count, width, dtype=self.dtype, device=self.values.device)
            with _on(dense):
                _kernels().fill[(count,)](
                    dense, *self.tensors, begin, width, block=_BLOCK, num_warps=_WARPS
                )
            yield dense


@dataclass(frozen=True)
class _Slots:
    """The tokens of a batch that use each expert; every expert has equally many slots, a power of 2.

    Attributes:
        inputs: the token in each slot, 0 in empty ones, `[experts * slots]` int64.
        tokens: the same with -1 in empty ones.
        coefficients: `[experts * slots]` float32.
        count: the slots of one expert.
    """

    inputs: Tensor
    tokens: Tensor
    coefficients: Tensor
    count: int

    @classmethod
    def of(cls, experts: Sequence[Sequence[float]], tokens: int, device: torch.device) -> "_Slots":
        """Assign slots.

        Args:
            experts: by expert, its coefficient for each row of the batch.
            tokens: the number of tokens, a multiple of the number of rows.
            device: of the tensors.
        """
        each = tokens // len(experts[0])
        users = [[t for t in range(tokens) if row[t // each]] for row in experts]
        count = _power(max(map(len, users)))
        empty = [[-1] * (count - len(user)) for user in users]
        places = torch.tensor(
            [user + rest for user, rest in zip(users, empty, strict=True)], dtype=torch.int64
        ).view(-1)
        coefficients = [
            [row[t // each] for t in user] + [0.0] * len(rest)
            for row, user, rest in zip(experts, users, empty, strict=True)
        ]
        both = torch.stack([places.clamp(min=0), places]).to(device)
        return cls(both[0], both[1], torch.tensor(coefficients, device=device).view(-1), count)


class Products:
    """The products of all sparse experts of one weight, each for the rows that use it.

    All that depends on the batch alone is made in its first step.
    """

    def __init__(self, matrices: Sequence[SparseRows], rows: Sequence[Sequence[float]]) -> None:
        """Note where the matrices are.

        Args:
            matrices: of the experts, at least one, of one shape and dtype.
            rows: by expert, its coefficient for each row of the batch, one of them not 0.
        """
        self._matrices, self._rows = tuple(matrices), rows  # the tables are valid while these live
        addresses = [[tensor.data_ptr() for tensor in matrix.tensors] for matrix in matrices]
        self._tables = torch.tensor(addresses, device=matrices[0].values.device)
        self._slots: dict[int, _Slots] = {}

    def serve(self, output: Tensor, x: Tensor) -> bool:
        """Tell whether the kernel computes these products: for few tokens, without gradients."""
        tokens = x[..., 0].numel()
        recorded = torch.is_grad_enabled() and (output.requires_grad or x.requires_grad)
        return 0 < tokens < _MANY_TOKENS and not recorded and output.is_contiguous()

    def add_(self, output: Tensor, x: Tensor) -> None:
        """Add the products to the output of the dense weight.

        Args:
            output: `[rows, ..., out]`, contiguous; the rows of the batch, or groups of consecutive ones.
            x: `[rows, ..., in]`.
        """
        flat = x.reshape(-1, x.shape[-1])
        tokens, first = len(flat), self._matrices[0]
        slots = self._slots.get(tokens)
        if slots is None:
            slots = self._slots[tokens] = _Slots.of(self._rows, tokens, x.device)
        inputs = flat.T.index_select(1, slots.inputs)
        kernels = _kernels()
        with _on(output):
            kernels.add_products[(first.shape[0],)](
                output,
                inputs,
                self._tables,
                slots.tokens,
                slots.coefficients,
                first.shape[0],
                tokens,
                len(self._matrices),
                slots=slots.count,
                padded=max(16, _power(tokens)),
                block=max(32, min(_BLOCK, _TILE // slots.count)),
                column_type=kernels.COLUMN_TYPES[first.columns.element_size()],
                value_type=kernels.VALUE_TYPES[first.values.element_size()],
                num_warps=_WARPS,
            )


def served(weight: Tensor) -> bool:
    """Tell whether the kernels serve a weight `[out, in]`: on CUDA, where Triton compiles them."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    return weight.is_cuda and weight.dtype in floats and _compiles(weight.device)


@cache
def _compiles(device: torch.device) -> bool:
    """Try a kernel. It needs Triton, and a compiler of C with Python's headers, which many containers lack."""
    try:
        matrix = SparseRows.of(
            torch.zeros(1, 2, device=device),
            torch.ones(1, dtype=torch.int64, device=device),
            torch.ones(1, device=device),
        )
        return [part.tolist() for part in matrix.dense()] == [[[0.0, 1.0]]]
    except Exception:  # noqa: BLE001 - whatever Triton says, torch's own products serve
        return False


@cache
def _kernels() -> ModuleType:
    from mergekit_mediator.serve import sparse_kernels

    return sparse_kernels


def _on(tensor: Tensor) -> Any:
    """Launch kernels on a tensor's device."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def _power(number: int) -> int:
    """Round up to a power of 2."""
    return 1 << (number - 1).bit_length()
