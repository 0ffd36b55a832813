"""The leading components of a matrix on the device, against a decomposition in float64 on the processor."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.merge.workers import load_linear_algebra
from mergekit_mediator.route.response import leading_directions

pytestmark = pytest.mark.gpu
LARGEST = {"gram": 1536, "projection": 100}
FIRST = 40  # components that are compared


def spectrum(out, width, seed=0):
    """A matrix in float64 whose singular values fall from 1 to 1/1000."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows):
        normal = torch.randn(rows, min(out, width), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal).Q

    values = torch.logspace(0, -3, min(out, width), dtype=torch.float64)
    return (orthonormal(out) * values) @ orthonormal(width).T


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("fast", [False, True], ids=["full", "tf32"])
def test_components_are_those_of_float64(device, tf32, shape, largest, fast):
    exact = spectrum(*shape)
    tf32(fast)
    found = decompose(exact.float().to(device), largest)
    assert {part.device.type for part in (found.left, found.values, found.right)} == {device.type}
    left, right = found.left.cpu().double(), found.right.cpu().double()
    values = found.values.cpu().double()
    expected = torch.linalg.svdvals(exact)
    torch.testing.assert_close(values[:FIRST], expected[:FIRST], rtol=1e-3, atol=0)
    for side in (left, right):
        torch.testing.assert_close(
            side[:, :FIRST].T @ side[:, :FIRST],
            torch.eye(FIRST, dtype=torch.float64),
            rtol=0,
            atol=1e-3,
        )
    rest = (exact - (left * values) @ right.T).square().sum()
    least = expected[len(values) :].square().sum()
    assert float(rest) <= 1.1 * float(least) + 1e-6
    assert found.energy == pytest.approx(float(expected.square().sum()), rel=1e-5)


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
def test_tf32_changes_no_bit_of_the_components(device, tf32, largest):
    matrix = spectrum(300, 200).float().to(device)
    found = []
    for fast in (False, True):
        tf32(fast)
        found.append(decompose(matrix, largest))
        assert torch.backends.cuda.matmul.allow_tf32 == fast
    assert torch.equal(found[0].left, found[1].left)
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[0].right, found[1].right)


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
def test_several_threads_find_equal_components(device, tf32, largest):
    tf32(True)
    load_linear_algebra(str(device))
    matrix = spectrum(300, 200).float().to(device)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: decompose(matrix, largest), range(8)))
    assert all(torch.equal(found[0].right, other.right) for other in found)
    assert torch.backends.cuda.matmul.allow_tf32


def test_threads_may_be_the_first_to_need_linear_algebra(cuda):
    program = (
        "import torch; from concurrent.futures import ThreadPoolExecutor;"
        "from mergekit_mediator.delta.decomposition import decompose;"
        "from mergekit_mediator.merge.workers import load_linear_algebra;"
        "load_linear_algebra('cuda'); m = torch.randn(96, 96, device='cuda');"
        "print(len(list(ThreadPoolExecutor(4).map(lambda _: decompose(m), range(8)))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout == "8\n", result.stderr


@pytest.mark.parametrize("largest", LARGEST.values(), ids=LARGEST)
def test_small_components_beside_a_large_one_are_found(device, tf32, largest):
    tf32(True)
    left, right = (torch.linalg.qr(spectrum(300, 200, seed)[:, :3]).Q for seed in (1, 2))
    values = torch.tensor([1.0, 1e-2, 3e-3], dtype=torch.float64)
    matrix = ((left * values) @ right.T).float()
    found = decompose(matrix.to(device), largest)
    torch.testing.assert_close(found.values[:3].cpu().double(), values, rtol=2e-2, atol=0)


def test_a_matrix_of_zeros_has_no_components(device):
    found = decompose(torch.zeros(30, 20, device=device))
    assert found.left.shape == (30, 0)
    assert found.left.device.type == device.type


@pytest.mark.parametrize("fast", [False, True], ids=["full", "tf32"])
def test_leading_directions_are_those_of_the_processor(device, tf32, fast):
    matrix = spectrum(60, 90).float()
    expected = leading_directions(matrix).float()
    tf32(fast)
    found = leading_directions(matrix.to(device)).cpu().float()
    signs = (found * expected).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=2e-3)
