"""Open an artifact, in a directory or on the Hub, and load its dense expert."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
)
from mergekit_mediator.remote_code import is_ours
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.share.pull import find_artifact
from mergekit_mediator.store.manifest import Manifest

_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
_QUANTISATION_OPTIONS = ("quantization_config", "load_in_8bit", "load_in_4bit")


class Artifact(NamedTuple):
    """An artifact that is ready to serve.

    Attributes:
        root: the directory.
        manifest: the manifest.
        model: the dense expert, as an ordinary transformers model.
        tokenizer: the tokenizer, or None if the artifact has none.
        fetch: brings an expert's file into the directory; None if all files are there.
    """

    root: Path
    manifest: Manifest
    model: PreTrainedModel
    tokenizer: Any
    fetch: Callable[[str], None] | None


def load_artifact(
    source: str | Path,
    revision: str | None,
    verify: bool,
    trust_remote_code: bool,
    experts: Iterable[str] = (),
    **kwargs: Any,
) -> Artifact:
    """Load an artifact with its dense expert; see `MediatorModel.from_pretrained`.

    Raises:
        ArtifactError: see `MediatorModel.from_pretrained`.
        ShareError: the repository cannot be read.
        MixtureError: an option loads the model quantised, or an expert is unknown.
    """
    for name in _QUANTISATION_OPTIONS:
        if kwargs.get(name):
            raise MixtureError(
                f"{name}: experts are put into floating-point weights: leave it out, and load the "
                "model in bfloat16"
            )
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    root, manifest, fetch = find_artifact(source, revision, verify, **hub)
    for name in experts:
        Mixture.of(name, manifest.expert_names)
    kwargs.setdefault("dtype", "auto")
    config = kwargs.pop("config", None)
    if not isinstance(config, PretrainedConfig):
        config = load_config(config or root, trust_remote_code)
    model = load_model(root, config, trust_remote_code, **kwargs)
    _forget_remote_code(model.config)
    return Artifact(root, manifest, model, load_tokenizer(root, trust_remote_code), fetch)


def attach_artifact(
    model: PreTrainedModel,
    source: str | Path,
    revision: str | None,
    verify: bool,
    trust_remote_code: bool,
) -> Artifact:
    """Open the artifact of a model that is loaded already; see `MediatorModel.attach`.

    Raises:
        ArtifactError: see `MediatorModel.attach`.
        ShareError: the repository cannot be read.
    """
    revision = revision or getattr(model.config, "_commit_hash", None)
    root, manifest, fetch = find_artifact(source, revision, verify)
    return Artifact(root, manifest, model, load_tokenizer(root, trust_remote_code), fetch)


def _forget_remote_code(config: Any) -> None:
    """Remove this package's remote code, so that the model is saved as the dense expert alone."""
    references = getattr(config, "auto_map", None) or {}
    others = {name: ref for name, ref in references.items() if not is_ours(ref)}
    if others:
        config.auto_map = others
    elif references:
        del config.auto_map
