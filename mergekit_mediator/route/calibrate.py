"""Calibration of an artifact's router: it reads prompts, and stores the fitted router and its figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import ArtifactError, OutputError, RoutingError
from mergekit_mediator.models.contexts import Contexts
from mergekit_mediator.models.prompt_files import data_digest, read_prompts
from mergekit_mediator.models.prompts import render
from mergekit_mediator.route import fit as fit_router
from mergekit_mediator.route.background import BACKGROUND
from mergekit_mediator.route.calibrated import CalibratedRouter, Head, Kind
from mergekit_mediator.route.calibrated_file import Limits
from mergekit_mediator.route.features import (
    SUMMARY,
    embedding_features,
    hidden_features,
    hidden_layers,
    shared_tokens,
)
from mergekit_mediator.route.fit import Calibration
from mergekit_mediator.store import durable
from mergekit_mediator.store.digests import digest
from mergekit_mediator.store.manifest import (
    ROUTER,
    Manifest,
    is_router_left_behind,
    read_manifest,
    write_manifest,
)
from mergekit_mediator.store.output_lock import output_lock
from mergekit_mediator.store.verification import verify_files

# The entry of the manifest about a router whose features come from an earlier dense expert.
OLD_DENSE = "old_dense"


def calibrate_artifact(
    root: Path,
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Path],
    *,
    kind: Kind = "hidden",
    head: Head = "ridge",
    seed: int = 0,
    manifest: Manifest | None = None,
) -> Calibration:
    """Fit the router of an artifact and store it there, in place of an older router.

    The features of experts without data come from the present router. A lock keeps other writers out. If the
    call is stopped at any moment, the artifact is valid and has either the old or the new router.

    Args:
        root: the directory of the artifact.
        model: its dense expert, a transformers model.
        tokenizer: its tokenizer.
        data: by expert, a file of prompts; see `prompt_files.read_prompts`.
        kind: the features; see `CalibratedRouter`. If `data` lacks some experts, `kind`, `head` and
            `seed` are those of the present router.
        head: see `fit.fit`.
        seed: see `fit.fit`.
        manifest: the manifest, if the caller verified the files before it loaded model and tokenizer.
            If None, this function verifies them.

    Returns:
        The router and its figures.

    Raises:
        RoutingError: an expert is unknown or has no data, or the data cannot be used.
        PromptError: a file of prompts cannot be read.
        ArtifactError: the artifact or its router cannot be read or was altered, or another process replaced
            the artifact during the calibration.
        OutputError: another process writes to the artifact, or the router cannot be written.
    """
    try:
        with output_lock(root):
            if manifest is None:
                manifest = read_manifest(root)
                verify_files(root, manifest)
            result, figures = fit_artifact(root, manifest, model, tokenizer, data, kind, head, seed)
            if read_manifest(root) != manifest:
                raise ArtifactError(
                    f"{root}: another artifact is there since the calibration began: run "
                    "`mergekit-mediator calibrate` again"
                )
            _store(root, manifest, result.router, figures)
    except OSError as error:
        raise OutputError(
            f"{root}: the router cannot be written: {error.strerror or error}: run `mergekit-mediator "
            "calibrate` again"
        ) from error
    return result


def fit_artifact(
    root: Path,
    manifest: Manifest,
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Path],
    kind: Kind = "hidden",
    head: Head = "ridge",
    seed: int = 0,
) -> tuple[Calibration, dict[str, Any]]:
    """Fit the router of an artifact, and store nothing; the arguments are those of `calibrate_artifact`.

    Returns:
        The router with its figures, and the figures for the manifest.

    Raises:
        RoutingError: see `calibrate_artifact`.
        PromptError: see `calibrate_artifact`.
        ArtifactError: the present router cannot be read.
    """
    for name in data:
        if name not in manifest.expert_names:
            names = ", ".join(manifest.expert_names)
            raise RoutingError(
                f"--data {name}: the name of an expert of this artifact required: one of {names}"
            )
    prompts = {name: read_prompts(path) for name, path in data.items()}
    ids = {name: [render(tokenizer, prompt) for prompt in rows] for name, rows in prompts.items()}
    missing = [name for name in manifest.expert_names if name not in data]
    if missing and (manifest.router or {}).get(OLD_DENSE):
        raise RoutingError(
            f"no data for {', '.join(missing)}: the features that the router holds come from an earlier dense "
            "expert: give --data NAME=FILE for each expert"
        )
    if missing and manifest.router_file is None:
        raise RoutingError(
            f"no data for {', '.join(missing)}: give --data NAME=FILE for each expert"
        )
    router = None
    if missing and manifest.router_file is not None:
        # The present router may have other experts than the artifact, if some were added or removed.
        router = CalibratedRouter.load(root / manifest.router_file, limits=Limits.of(model))
    if router is not None:
        kind, head, seed = router.kind, router.head, router.seed
        tokens = router.tokens
    elif kind == "embedding":
        tokens = shared_tokens(ids)
    else:
        tokens = torch.tensor(tokenizer(SUMMARY, add_special_tokens=False).input_ids)
    contexts = Contexts(tokenizer)
    features = _features(model, contexts, ids, kind, tokens)
    if router is not None:
        background = router.background
    else:
        general = [render(tokenizer, text) for text in BACKGROUND]
        background = _features(model, contexts, {"background": general}, kind, tokens)["background"]
    router_features = dict(router.features) if router is not None else {}
    gaps = [name for name in missing if name not in router_features]
    if gaps:
        raise RoutingError(
            f"no data for {', '.join(gaps)}, and the present router holds none: give --data NAME=FILE "
            "for each of them"
        )
    result = fit_router.fit(
        {name: {**router_features, **features}[name] for name in manifest.expert_names},
        kind,
        head=head,
        layers=_layers(model) if kind == "hidden" else (),
        tokens=tokens,
        background=background,
        seed=seed,
    )
    digests = dict((manifest.router or {}).get("data", {})) if missing else {}
    digests |= {name: data_digest(rows) for name, rows in prompts.items()}
    return result, {**result.figures, "data": digests}


def _features(
    model: Any,
    contexts: Contexts,
    ids: Mapping[str, Sequence[Sequence[int]]],
    kind: Kind,
    tokens: Tensor,
) -> dict[str, Tensor]:
    """Compute by expert the features `[n_prompts, d]` of its prompts, as the runtime does for a request."""
    if kind == "embedding":
        table = model.get_input_embeddings().weight.detach()
        return embedding_features(ids, table, tokens)

    def one(row: Sequence[int]) -> Tensor:
        prompt = torch.tensor([row], device=model.device)
        mask = torch.ones_like(prompt)
        counted = contexts.counted(prompt, mask)
        return hidden_features(model, prompt, mask, counted, tokens, _layers(model)).cpu()

    return {name: torch.cat([one(row) for row in rows]) for name, rows in ids.items()}


def _layers(model: Any) -> tuple[int, int]:
    return hidden_layers(model.config.get_text_config().num_hidden_layers)


def _store(
    root: Path, manifest: Manifest, router: CalibratedRouter, figures: dict[str, Any]
) -> None:
    """Replace the router. The artifact is valid after every step, and a single step switches the routers.

    The manifest holds the router's digest, and no step changes both files. So the new router first gets a name
    that no other router has. Once the manifest names that file, nobody reads the file with the usual name. The
    new router then replaces that file, and the manifest names it again.
    """
    others = {name: d for name, d in manifest.files.items() if name != manifest.router_file}
    partial = root / f"{ROUTER}.partial"

    def name_in_manifest(name: str) -> None:
        update = {"router": figures, "files": {**others, name: router_digest}}
        write_manifest(root, manifest.model_copy(update=update))

    try:
        router.save(partial)
        router_digest = digest(partial)
        unique_name = f"mediator/router-{router_digest.sha256[:12]}.safetensors"
        durable.replace(partial, root / unique_name)
        name_in_manifest(unique_name)
        shutil.copyfile(root / unique_name, partial)
        durable.replace(partial, root / ROUTER)
        name_in_manifest(ROUTER)
    finally:
        _remove_leftovers(root)


def _remove_leftovers(root: Path) -> None:
    """Remove the router files that the manifest does not name, such as those of a killed process."""
    manifest = read_manifest(root)
    for path in (root / ROUTER).parent.glob("router*"):
        name = path.relative_to(root).as_posix()
        if is_router_left_behind(name.removesuffix(".partial"), manifest):
            path.unlink()
