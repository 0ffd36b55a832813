"""The decompositions of task vectors, on disk between the pass that measures and the pass that encodes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_mediator.delta.approximate import as_matrix, is_vector
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Components

# The name of their directory inside the staging directory; it is gone before the artifact is described.
SPECTRA = ".spectra"


class Spectra:
    """Decompositions by expert and weight, one file each, so that no weight is decomposed twice.

    A file holds the components that any slope can store. Fine-tunes of 16-bit weights have few of them above
    the noise of rounding.
    """

    def __init__(self, directory: Path) -> None:
        """Keep the files in a directory, which exists."""
        self._directory = directory

    def decompose(self, expert: str, weight: str, tau: Tensor) -> Components | None:
        """Decompose a task vector, and write its components to disk.

        Args:
            expert: the name of the expert.
            weight: the name of the weight.
            tau: the task vector, float32, any shape.

        Returns:
            The components of the task vector as a matrix; None if it is a vector, which has none.
        """
        if is_vector(tau):
            return None
        components = decompose(as_matrix(tau)).storable()
        path = self._path(expert, weight)
        path.parent.mkdir(exist_ok=True)
        tensors = {
            "left": components.left,
            "values": components.values,
            "right": components.right,
            "energy": torch.tensor(components.energy, dtype=torch.float64),
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        return components

    def read(self, expert: str, weight: str, device: str = "cpu") -> Components | None:
        """Read the components that `decompose` wrote.

        Args:
            expert: the name of the expert.
            weight: the name of the weight.
            device: the device of the components.

        Returns:
            The components, with the same bits; None if `decompose` wrote none.
        """
        path = self._path(expert, weight)
        if not path.exists():
            return None
        tensors = load_file(path, device=device)
        energy = float(tensors["energy"])
        return Components(tensors["left"], tensors["values"], tensors["right"], energy)

    def _path(self, expert: str, weight: str) -> Path:
        return self._directory / expert / f"{weight}.safetensors"


@contextmanager
def spectra_in(out: Path) -> Iterator[Spectra]:
    """Keep decompositions in a directory of a staging directory, and remove them at the end."""
    directory = out / SPECTRA
    directory.mkdir()
    try:
        yield Spectra(directory)
    finally:
        shutil.rmtree(directory)
