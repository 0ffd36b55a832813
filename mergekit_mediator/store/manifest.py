"""The artifact: a directory with an ordinary checkpoint, sparse experts, and the manifest that vouches for them."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store import durable, in_place
from mergekit_mediator.store.loaded_files import loaded_files
from mergekit_mediator.store.staging_directories import staging_directories

MANIFEST = "mediator/manifest.json"
EXPERTS = "mediator/experts"
CARD = "README.md"
CONFIG_SOURCE = "mergekit_config.yml"
ROUTER = "mediator/router.safetensors"
RESPONSE = "mediator/response.safetensors"
FORMAT_VERSION = 1
_ROUTER_FILE = re.compile(r"mediator/router(-[0-9a-f]{12})?\.safetensors")
EXPERT_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Model):
    """What a file must be: its SHA-256 in hexadecimal, and its size."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class BaseEntry(_Model):
    """The base model: where it came from, and its weight files by name."""

    source: str
    revision: str | None = None
    license: str | None = None
    files: dict[str, FileDigest]


class Tuned(_Model):
    """What an expert was tuned on, and what that did: KL(expert ‖ stored) in nats for each answer, of prompts
    that were not learnt from, before and after."""

    prompts: Annotated[int, Field(gt=0)]
    data: str
    divergence_before: float
    divergence_after: float


class ExpertEntry(_Model):
    """One expert: where it came from, its share in the mean, and its file below `mediator/`."""

    name: Annotated[str, Field(pattern=EXPERT_NAME)]
    source: str
    revision: str | None = None
    license: str | None = None
    weight: Any = 1.0
    file: str
    tuned: Tuned | None = None


class LayerEntry(_Model):
    """One layer: its weights, its conflict by metric in [0, 1] where it was measured, and the decision."""

    name: str
    weights: tuple[str, ...]
    conflict: dict[str, float] = {}
    routed: bool


class Manifest(_Model):
    """Everything that is needed to trust an artifact and to run it.

    Attributes:
        format_version: of the artifact; this package reads version 1.
        parameters: the configuration's parameters, with their defaults.
        parameter_count: of the dense expert, each tied weight counted once.
        router: which router `router_file` holds, with its held-out figures, or None.
        files: digest by path of every other file of the artifact.
    """

    format_version: int
    package_version: str
    base: BaseEntry
    experts: tuple[ExpertEntry, ...]
    layers: tuple[LayerEntry, ...]
    parameters: dict[str, Any]
    parameter_count: int
    router: dict[str, Any] | None = None
    files: dict[str, FileDigest]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileDigest]) -> dict[str, FileDigest]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", name):
                raise ValueError(f"{name!r} is not a path inside the artifact")
        return files

    @field_validator("experts")
    @classmethod
    def _unique(cls, experts: tuple[ExpertEntry, ...]) -> tuple[ExpertEntry, ...]:
        if len({e.name for e in experts}) < len(experts):
            raise ValueError("two experts have the same name")
        for expert in experts:
            if expert.file != f"experts/{expert.name}.safetensors":
                raise ValueError(
                    f"expert {expert.name!r} must be experts/{expert.name}.safetensors"
                )
        return experts

    @property
    def expert_names(self) -> tuple[str, ...]:
        """In the order of the configuration."""
        return tuple(expert.name for expert in self.experts)

    @property
    def router_file(self) -> str | None:
        """The file of the calibrated router, if there is one.

        It is `ROUTER`, or has its digest in its name, if a process was killed while it replaced a router.
        """
        return next(filter(_ROUTER_FILE.fullmatch, self.files), None)

    @property
    def routed_layers(self) -> tuple[LayerEntry, ...]:
        """The layers of which every expert keeps its own version."""
        return tuple(layer for layer in self.layers if layer.routed)


def digest(path: Path) -> FileDigest:
    """The digest of a file, read once as a stream."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return FileDigest(sha256=state.hexdigest(), bytes=path.stat().st_size)


def digests(root: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """The digests of files below a directory, two at a time: hashing leaves the interpreter free."""
    ordered = list(names)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ordered, pool.map(lambda name: digest(root / name), ordered), strict=True))


def files_below(root: Path) -> list[str]:
    """All files of an artifact but its manifest, as sorted relative paths."""
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def vouched_for(root: Path) -> list[str]:
    """The files that a manifest names: all but the model card, which people edit on the Hub."""
    return [name for name in files_below(root) if name != CARD]


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest beside its place, then move it there in one step."""
    (root / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(root / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest, without looking at the files it names.

    Raises:
        ArtifactError: there is none, it is not valid, it is of another version, or it does not vouch
            for every expert.
    """
    path = root / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if any(map(in_place.is_half_published, staging_directories(root.resolve()))):
            raise ArtifactError(
                f"{root}: a merge was stopped while it moved its files there: run it again, which "
                "first puts back what was there"
            ) from error
        raise ArtifactError(
            f"{path}: cannot be read, so {root} is not a mediator artifact: {error}"
        ) from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {place or 'content'}: {first['msg']}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format_version {FORMAT_VERSION} required, got {manifest.format_version}: "
            "use the version of mergekit-mediator that wrote it"
        )
    for expert in manifest.experts:
        if f"mediator/{expert.file}" not in manifest.files:
            raise ArtifactError(f"{path}: no digest of expert {expert.name!r}'s file")
    return manifest


def verify_files(root: Path, manifest: Manifest) -> None:
    """Check size and digest of every file that the manifest names, and that loading reads no other.

    Raises:
        ArtifactError: naming the first file that is missing or differs, or that loading would read
            though it is not named.
    """
    for name, expected in manifest.files.items():
        path = root / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, but named by the manifest")
        if path.stat().st_size != expected.bytes:
            raise ArtifactError(
                f"{path}: {expected.bytes} bytes required, got {path.stat().st_size}"
            )
    with _reading(root):
        for name in loaded_files(root):
            if name not in manifest.files and not is_router_left_behind(name, manifest):
                raise ArtifactError(
                    f"{root / name}: not named by the manifest, but would be loaded: remove it"
                )
        read = digests(root, manifest.files)
    for name, found in read.items():
        if found != manifest.files[name]:
            raise ArtifactError(
                f"{root / name}: SHA-256 {manifest.files[name].sha256[:12]}… required, got "
                f"{found.sha256[:12]}…: the file was altered after the merge"
            )


def is_router_left_behind(name: str, manifest: Manifest) -> bool:
    """Whether a file is a router that nobody reads: `calibrate` was stopped before the manifest named it, or after."""
    if name == ROUTER:
        return manifest.router_file not in (None, ROUTER)
    return bool(_ROUTER_FILE.fullmatch(name)) and name != manifest.router_file


def verify_base(base: Path, manifest: Manifest) -> None:
    """Check that a local directory holds the base model that the artifact was made from.

    Raises:
        ArtifactError: naming the first weight file that is missing or differs.
    """
    for name, expected in manifest.base.files.items():
        path = base / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing from the base model, {manifest.base.source}")
        with _reading(base):
            found = digest(path)
        if found != expected:
            raise ArtifactError(
                f"{path}: is not the base this artifact was made from (SHA-256 differs)"
            )


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{error.filename or root}: cannot be read: {error.strerror or error}"
        ) from error
