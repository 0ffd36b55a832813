"""Calibrates the router of an artifact: prompts in, the fitted router and its figures in place."""

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
from mergekit_mediator.store.manifest import (
    ROUTER,
    Manifest,
    digest,
    is_router_left_behind,
    read_manifest,
    verify_files,
    write_manifest,
)
from mergekit_mediator.store.output_lock import output_lock


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
    """Fit the router of an artifact and store it there, in place of an older one.

    Experts without data keep what the present router knows of them. Whatever stops this, the artifact
    is the old or the new one, and valid. Nobody else can write to it meanwhile.

    Args:
        root: of the artifact.
        model: its dense expert.
        tokenizer: of the artifact.
        data: a JSONL file by expert; see `prompt_files.read_prompts`.
        kind, head, seed: see `fit.fit`; where some experts keep their old data, those of the
            present router are used.
        manifest: of the artifact, if its files were verified before model and tokenizer were loaded.
            Without it they are verified here.

    Raises:
        RoutingError: an unknown expert, an expert without data, or data that cannot be used.
        ArtifactError: the artifact or its router cannot be read, was altered, or has become another one.
        OutputError: another process writes to the artifact, or the router cannot be written.
    """
    try:
        with output_lock(root):
            if manifest is None:
                manifest = read_manifest(root)
                verify_files(root, manifest)
            result, figures = _fit(root, manifest, model, tokenizer, data, kind, head, seed)
            if read_manifest(root) != manifest:
                raise ArtifactError(f"{root}: has become another artifact meanwhile: run it again")
            _store(root, manifest, result.router, figures)
    except OSError as error:
        raise OutputError(
            f"{root}: the router cannot be written: {error.strerror or error}: run `mergekit-mediator "
            "calibrate` again"
        ) from error
    return result


def _fit(
    root: Path,
    manifest: Manifest,
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Path],
    kind: Kind,
    head: Head,
    seed: int,
) -> tuple[Calibration, dict[str, Any]]:
    """The router, and what the manifest says of it."""
    for name in data:
        if name not in manifest.expert_names:
            known = ", ".join(manifest.expert_names)
            raise RoutingError(f"--data {name}: this artifact has no such expert, but {known}")
    prompts = {name: read_prompts(path) for name, path in data.items()}
    ids = {name: [render(tokenizer, prompt) for prompt in rows] for name, rows in prompts.items()}
    missing = [name for name in manifest.expert_names if name not in data]
    if missing and manifest.router_file is None:
        raise RoutingError(
            f"no data for {', '.join(missing)}: give --data NAME=FILE for each expert"
        )
    old = None
    if missing and manifest.router_file is not None:
        # of other experts than now, if some were added or removed
        old = CalibratedRouter.load(root / manifest.router_file, limits=Limits.of(model))
    if old is not None:
        kind, head, seed = old.kind, old.head, old.seed
    if old is not None:
        tokens = old.tokens
    elif kind == "embedding":
        tokens = shared_tokens(ids)
    else:
        tokens = torch.tensor(tokenizer(SUMMARY, add_special_tokens=False).input_ids)
    contexts = Contexts(tokenizer)
    features = _features(model, contexts, ids, kind, tokens)
    if old is not None:
        background = old.background
    else:
        general = [render(tokenizer, text) for text in BACKGROUND]
        background = _features(model, contexts, {"background": general}, kind, tokens)["background"]
    known_features = dict(old.features) if old is not None else {}
    absent = [name for name in missing if name not in known_features]
    if absent:
        raise RoutingError(f"no data for {', '.join(absent)}, and the router does not know them")
    result = fit_router.fit(
        {name: {**known_features, **features}[name] for name in manifest.expert_names},
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
    """By expert, `[n_prompts, d]`: the same as the runtime takes of a request."""
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
    """Replace the router. The artifact is valid after every step, and one step makes the old one the new one.

    The manifest vouches for the router by digest, and no step changes both. So the router first gets a
    name of its own. Once the manifest names that, nobody reads what has the usual name: it is replaced,
    and then named again.
    """
    others = {name: d for name, d in manifest.files.items() if name != manifest.router_file}
    partial = root / f"{ROUTER}.partial"

    def vouch(name: str) -> None:
        update = {"router": figures, "files": {**others, name: router_digest}}
        write_manifest(root, manifest.model_copy(update=update))

    try:
        router.save(partial)
        router_digest = digest(partial)
        own_name = f"mediator/router-{router_digest.sha256[:12]}.safetensors"
        durable.replace(partial, root / own_name)
        vouch(own_name)
        shutil.copyfile(root / own_name, partial)
        durable.replace(partial, root / ROUTER)
        vouch(ROUTER)
    finally:
        _remove_leftovers(root)


def _remove_leftovers(root: Path) -> None:
    """Remove routers that the manifest does not name, also those of a process that was killed."""
    manifest = read_manifest(root)
    for path in (root / ROUTER).parent.glob("router*"):
        name = path.relative_to(root).as_posix()
        if is_router_left_behind(name.removesuffix(".partial"), manifest):
            path.unlink()
