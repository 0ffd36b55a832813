"""Fetch the manifest of an artifact on the Hub and the headers of its experts' files, and no more."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfFileSystem

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.share.failures import failures
from mergekit_mediator.share.pull import Repository
from mergekit_mediator.store.expert_header import DESCRIPTIONS
from mergekit_mediator.store.manifest import EXPERTS, MANIFEST

# The bytes of the first request, which holds most headers.
_FIRST = 1 << 16
_LARGEST = 100 << 20  # the limit of safetensors


@contextmanager
def fetched_headers(name: str, revision: str | None = None) -> Iterator[Path]:
    """Fetch the manifest of a repository, and headers and descriptions of its experts' files.

    The experts' files have holes in the place of their values. The files are deleted after the context.

    Args:
        name: `USER/NAME`.
        revision: the repository's branch, tag or commit.

    Yields:
        The directory of the files.

    Raises:
        ShareError: the repository cannot be read.
        ArtifactError: the repository holds no artifact, or the file of an expert is malformed.
    """
    repository = Repository.at(name, revision)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / EXPERTS).mkdir(parents=True)
        (root / MANIFEST).write_bytes((repository.root / MANIFEST).read_bytes())
        for expert in repository.manifest.experts:
            path = f"mediator/{expert.file}"
            with failures(name, revision):
                _copy_header(repository, path, root / path)
        yield root


def _copy_header(repository: Repository, name: str, target: Path) -> None:
    """Write a file with the header, the descriptions and the size of an expert's file on the Hub."""
    size = repository.manifest.files[name].bytes
    remote = f"{repository.name}@{repository.commit}/{name}"
    files = HfFileSystem()

    def part(start: int, end: int) -> bytes:
        content: bytes = files.cat_file(remote, start=start, end=min(end, size))
        return content

    first = part(0, _FIRST)
    length = 8 + int.from_bytes(first[:8], "little")
    try:
        if not 8 < length <= min(size, _LARGEST):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = first[:length] + (part(len(first), length) if length > len(first) else b"")
        start, end = json.loads(header[8:])[DESCRIPTIONS]["data_offsets"]
        if not 0 <= start <= end <= size - length:
            raise ValueError(f"descriptions from {start} to {end} in a file of {size} bytes")
    except (ValueError, KeyError, TypeError) as error:
        where = f"{repository.name}: {name}"
        raise ArtifactError(f"{where}: cannot be read as a sparse expert: {error}") from error
    with target.open("xb") as file:
        file.write(header)
        file.seek(length + start)
        file.write(part(length + start, length + end))
        file.truncate(size)
