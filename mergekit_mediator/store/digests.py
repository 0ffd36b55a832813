"""The digests of files: the content that a file must have."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class FileDigest(BaseModel):
    """The content that a file must have.

    Attributes:
        sha256: of the content, in hexadecimal.
        bytes: the size of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


def digest(path: Path) -> FileDigest:
    """Compute the digest of a file, which is read once as a stream.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return FileDigest(sha256=state.hexdigest(), bytes=path.stat().st_size)


def digest_of(content: bytes) -> FileDigest:
    """The digest of a file with this content."""
    return FileDigest(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def digests(root: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Compute the digests of files below a directory by two threads; hashing leaves the interpreter free.

    Raises:
        OSError: a file cannot be read.
    """
    ordered = list(names)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ordered, pool.map(lambda name: digest(root / name), ordered), strict=True))
