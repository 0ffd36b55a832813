"""The manifest of an artifact: its experts and layers, and the digests of all its files."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store import durable, in_place
from mergekit_mediator.store.digests import FileDigest
from mergekit_mediator.store.staging_directories import staging_directories

MANIFEST = "mediator/manifest.json"
EXPERTS = "mediator/experts"
CARD = "README.md"
CONFIG_SOURCE = "mergekit_config.yml"
ROUTER = "mediator/router.safetensors"
RESPONSE = "mediator/response.safetensors"
# These files describe the model to people. Commands write them after the merge, and no manifest vouches for them.
EVALUATION = "mediator/evaluation.json"
PICTURES = ("mediator/layers.png", "mediator/router.png", "mediator/evaluation.png")
FORMAT_VERSION = 1
_ROUTER_FILE = re.compile(r"mediator/router(-[0-9a-f]{12})?\.safetensors")
EXPERT_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseEntry(_Model):
    """The base model.

    Attributes:
        source: its directory, or its repository on the Hub.
        revision: of the repository.
        license: as its card says.
        files: the digests of its weight files, by name.
    """

    source: str
    revision: str | None = None
    license: str | None = None
    files: dict[str, FileDigest]


class Tuned(_Model):
    """The tuning of an expert on prompts.

    Attributes:
        prompts: the number of prompts.
        data: the digest of the prompts; None for texts that the expert wrote.
        divergence_before: KL(expert ‖ stored) in nats per answer before tuning, the mean of held-out prompts.
        divergence_after: the same after tuning.
    """

    prompts: Annotated[int, Field(gt=0)]
    data: str | None
    divergence_before: float
    divergence_after: float

    @property
    def written(self) -> bool:
        """Whether the expert wrote the texts itself."""
        return self.data is None


class ExpertEntry(_Model):
    """One expert.

    Attributes:
        name: as in the configuration.
        source: its directory, or its repository on the Hub.
        revision: of the repository.
        license: as its card says.
        weight: of the expert in the mean, as in the configuration.
        file: its path below `mediator/`.
        tuned: its tuning on prompts, if there was one.
    """

    name: Annotated[str, Field(pattern=EXPERT_NAME)]
    source: str
    revision: str | None = None
    license: str | None = None
    weight: Any = 1.0
    file: str
    tuned: Tuned | None = None


class LayerEntry(_Model):
    """One layer.

    Attributes:
        name: of the layer.
        weights: the names of its weights in the checkpoint.
        conflict: in [0, 1] by metric; empty if no merge step measured it.
        routed: whether every expert has its own version; else the layer is averaged.
    """

    name: str
    weights: tuple[str, ...]
    conflict: dict[str, float] = {}
    routed: bool


class Change(_Model):
    """One change of an artifact after its merge.

    Attributes:
        action: the kind of the change.
        expert: the name of the expert before the change.
        package_version: of the mergekit-mediator that made the change.
        details: the arguments of the change and its figures, as plain values.
        note: one sentence for people: the change, and its limits.
    """

    action: Literal["add", "remove", "rename", "requantize", "rebuild"]
    expert: str
    package_version: str
    details: dict[str, Any] = {}
    note: str


class Manifest(_Model):
    """Everything that a reader needs to trust an artifact and to run it.

    Attributes:
        format_version: of the artifact; this package reads version 1.
        package_version: of the mergekit-mediator that wrote it.
        base: the base model.
        experts: in the order of the configuration.
        layers: of the model, from the embeddings to the head.
        parameters: the configuration's parameters, with their defaults.
        parameter_count: of the dense expert; each tied weight counts once.
        router: the kind of the router in `router_file` and its held-out figures, or None. If the artifact was
            changed and the router was not, `stale` says in a sentence how that shows.
        files: the digests of all files but the manifest and the card, by path inside the artifact.
        history: the changes since the merge, the oldest first.
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
    history: tuple[Change, ...] = ()

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
    def merged_by(self) -> str | None:
        """The method by which the experts were merged into the dense expert; None if it is their mean or the base."""
        reference = self.parameters.get("reference", "mean")
        return None if reference in ("mean", "base") else str(reference)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the experts, in the order of the configuration."""
        return tuple(expert.name for expert in self.experts)

    @property
    def router_file(self) -> str | None:
        """The path of the calibrated router, if there is one.

        It is `ROUTER`. If a process was killed while it replaced a router, its name contains its digest.
        """
        return next(filter(_ROUTER_FILE.fullmatch, self.files), None)

    @property
    def routed_layers(self) -> tuple[LayerEntry, ...]:
        """The layers of which every expert keeps its own version."""
        return tuple(layer for layer in self.layers if layer.routed)


def files_below(root: Path) -> list[str]:
    """List all files of an artifact but its manifest, as sorted paths inside it."""
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def vouched_for(root: Path) -> list[str]:
    """List the files that a manifest names: all but the model card, which people edit on the Hub."""
    return [name for name in files_below(root) if name != CARD]


def manifest_text(manifest: Manifest) -> str:
    """The manifest as it is written. Without a history, version 0.1.0 reads it too."""
    unused = None if manifest.history else {"history"}
    return manifest.model_dump_json(indent=1, exclude=unused) + "\n"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest beside its place, then move it into place in one step."""
    (root / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(root / MANIFEST, manifest_text(manifest))


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest, without a look at the files that it names.

    Raises:
        ArtifactError: the manifest is missing, invalid or of another version, or an expert has no digest.
    """
    path = root / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if any(map(in_place.is_half_published, staging_directories(root.resolve()))):
            raise ArtifactError(
                f"{root}: a merge was interrupted while it moved its files there: run it again; it "
                "first puts the old files back"
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
            raise ArtifactError(
                f"{path}: a digest of {expert.file} required, expert {expert.name!r} has none: merge again"
            )
    return manifest


def is_router_left_behind(name: str, manifest: Manifest) -> bool:
    """Tell whether a file is a router that nobody reads, since `calibrate` was interrupted.

    Args:
        name: the path of the file inside the artifact.
        manifest: of the artifact.
    """
    if name == ROUTER:
        return manifest.router_file not in (None, ROUTER)
    return bool(_ROUTER_FILE.fullmatch(name)) and name != manifest.router_file
