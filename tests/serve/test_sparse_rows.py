"""Where there is no CUDA, torch's own sparse products serve rows."""

import sys

import pytest
import torch

from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.serve.row_modules import sparse_matrix
from mergekit_mediator.serve.sparse_rows import SparseRows, served


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_processor_multiplies_csr_matrices(dtype):
    dense = torch.randn(8, 16).to(dtype)
    expert = (dense.float() + torch.randn(8, 16)).to(dtype)
    stored = encode(expert, dense, 0.2, "exact")
    assert not served(dense)
    matrix = sparse_matrix(dense, stored)
    assert matrix.layout is torch.sparse_csr
    assert matrix.dtype == torch.float32
    assert "mergekit_mediator.serve.sparse_kernels" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 30.0])
def test_values_keep_eleven_bits_in_weights_of_sixteen(dtype, size):
    weight = torch.zeros(3, 40, dtype=dtype)
    positions = torch.tensor([0, 5, 41, 119])  # row 1 has one value
    values = size * torch.tensor([1.0, -0.3, 1e-4, 0.77])
    matrix = SparseRows.of(weight, positions, values)
    assert matrix.first.tolist() == [0, 2, 3, 4]
    assert matrix.columns.tolist() == [0, 5, 1, 39]
    kept = matrix.values.float() * matrix.scale
    limit = 0.0 if dtype == torch.float32 else 2**-11
    torch.testing.assert_close(kept, values, rtol=limit, atol=0.0)


def test_wide_matrices_and_those_without_values_are_held():
    assert SparseRows.of(
        torch.zeros(1, 40_000), torch.tensor([39_999]), torch.ones(1)
    ).columns.tolist() == [39_999]
    empty = torch.empty(0)
    matrix = SparseRows.of(torch.zeros(2, 4, dtype=torch.bfloat16), empty.long(), empty)
    assert matrix.first.tolist() == [0, 0, 0]
