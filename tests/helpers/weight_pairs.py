"""Pairs of an expert's and the dense expert's weight, and how their bits are compared."""

import torch
from hypothesis import strategies as st

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DTYPES = st.sampled_from(list(BITS))
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 0), (1, 1), (5, 9), (2, 3, 4)])


def bits(weight):
    return weight.contiguous().view(BITS[weight.dtype])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@st.composite
def pairs(draw):
    """An expert and a dense expert with many equal coordinates, ties, zeros of both signs."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(shape, generator=generator).to(dtype)
    steps = torch.randint(-3, 4, shape, generator=generator)
    expert = (dense.float() + 0.25 * steps).to(dtype)
    if draw(st.booleans()):
        expert = torch.where(steps == 1, torch.zeros_like(dense), expert)
        dense = torch.where(steps == 1, -torch.zeros_like(dense), dense)
    return expert, dense
