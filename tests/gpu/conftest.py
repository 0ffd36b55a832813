"""The device of the tests in this folder: `pytest -m gpu tests/gpu` on a machine that has one.

`MEDIATOR_TEST_DEVICE=cpu` tries them on the processor; those of streams, pinned memory and kernels are skipped there.
"""

import os

import pytest
import torch

from mergekit_mediator.merge import plugin

# before `mergekit.scripts.run_yaml` is imported: the package may run from its tree, without the start-up hook
plugin.install()
NAME = os.environ.get("MEDIATOR_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device():
    """The device under test, with its number."""
    if not NAME.startswith("cuda"):
        return torch.device(NAME)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: MEDIATOR_TEST_DEVICE=cpu runs these tests on the processor")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device):
    """The device under test, which must be a GPU."""
    if device.type != "cuda":
        pytest.skip(
            f"no CUDA device: {device} has no streams, no pinned memory and no kernels of Triton"
        )
    return device


@pytest.fixture
def tf32():
    """Switches TF32 on or off; at the end it is as before."""
    before = torch.backends.cuda.matmul.allow_tf32

    def switch(on):
        torch.backends.cuda.matmul.allow_tf32 = on

    yield switch
    switch(before)
