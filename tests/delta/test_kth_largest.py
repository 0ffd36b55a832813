import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_mediator.delta import kth_largest as threshold
from mergekit_mediator.delta.chunks import CHUNK, chunks
from mergekit_mediator.delta.kth_largest import count_kept, kth_largest, nonzero


def oracle(values: torch.Tensor, k: int) -> tuple[float, int]:
    value = float(values.sort(descending=True).values[k - 1])
    return value, int((values > value).sum())


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60), st.data())
def test_kth_largest_of_few_values_equals_sorting(values, data):
    tensor = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(tensor.__getitem__, tensor.numel(), k) == oracle(tensor, k)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["smooth", "ties", "constant", "mostly zero", "infinite"])
def test_kth_largest_of_many_values_equals_sorting(kind, share):
    values = torch.randn(200_003, generator=torch.Generator().manual_seed(1)).abs()
    if kind == "ties":
        values = values.mul(4).round()
    elif kind == "constant":
        values = torch.full_like(values, 3)
    elif kind == "mostly zero":
        values[1000:] = 0
    elif kind == "infinite":
        values[::3] = torch.inf
    k = max(1, round(share * values.numel()))
    assert kth_largest(values.__getitem__, values.numel(), k) == oracle(values, k)


def test_kth_largest_is_exact_when_the_sample_misleads(monkeypatch):
    values = torch.arange(200_000, dtype=torch.float32)
    monkeypatch.setattr(threshold, "_bracket", lambda *_: (np.array([5.0, 6.0]), 5.5))
    assert kth_largest(values.__getitem__, values.numel(), 10) == (199_990.0, 9)


@given(st.integers(0, 3 * CHUNK + 5))
def test_chunks_cover_every_coordinate_once_and_are_bounded(numel):
    parts = list(chunks(numel))
    assert [i for p in parts for i in (p.start, p.stop)] == sorted(
        [0, numel, *(2 * [p.start for p in parts[1:]])] if parts else []
    )
    assert all(0 < p.stop - p.start <= CHUNK for p in parts)


@pytest.mark.parametrize(
    ("numel", "fraction", "kept"),
    [(0, 0.5, 0), (1, 0.001, 1), (10, 0.1, 1), (10, 0.26, 3), (10, 1.0, 10), (3, 0.9999, 3)],
)
def test_count_kept_rounds_and_keeps_at_least_one(numel, fraction, kept):
    assert count_kept(numel, fraction) == kept


@given(st.lists(st.booleans(), max_size=50))
def test_nonzero_gives_the_ascending_positions_of_true(flags):
    assert nonzero(torch.tensor(flags, dtype=torch.bool)).tolist() == [
        i for i, flag in enumerate(flags) if flag
    ]
