"""What `inspect` reads of an artifact: its manifest, and the headers of the experts' files."""

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
from mergekit_mediator.store.manifest import MANIFEST

# Most headers are read with the first request.
_FIRST = 1 << 16
_LARGEST = 100 << 20  # as in safetensors


@contextmanager
def headers(source: str, revision: str | None = None) -> Iterator[Path]:
    """A directory that holds at least the manifest and what the experts' files say about themselves.

    Args:
        source: a directory, which is given as it is; or a repository, of whose experts only the headers
            and descriptions are fetched: files with holes for the rest, gone after the context.
        revision: of the repository.

    Raises:
        ShareError: the repository cannot be read.
        ArtifactError: it holds no artifact, or a file that is none of an expert.
    """
    if Path(source).is_dir():
        yield Path(source)
        return
    repository = Repository.at(source, revision)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / MANIFEST).parent.mkdir()
        (root / MANIFEST).write_bytes((repository.root / MANIFEST).read_bytes())
        for expert in repository.manifest.experts:
            name = f"mediator/{expert.file}"
            (root / name).parent.mkdir(exist_ok=True)
            with failures(source, revision):
                _copy_header(repository, name, root / name)
        yield root


def _copy_header(repository: Repository, name: str, target: Path) -> None:
    """Write a file that has its header, its descriptions and its size of one on the Hub, and else holes."""
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
