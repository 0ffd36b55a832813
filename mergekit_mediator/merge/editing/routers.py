"""The routers of an artifact whose experts change.

The response router has a row for each expert. The calibrated router holds the features of each expert's prompts,
so it can be fitted again without the prompts.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.merge.editing.workspace import Workspace
from mergekit_mediator.models.modules import input_embedding
from mergekit_mediator.route import fit
from mergekit_mediator.route.calibrate import OLD_DENSE
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.store.manifest import RESPONSE, ROUTER

Figures = dict[str, Any] | None
_BY_EXPERT = ("prompts", "data")  # figures that are objects by expert


def rename_in_routers(work: Workspace, old: str, new: str) -> Figures:
    """Rename an expert in both routers; every decision stays as it is.

    Returns:
        The figures of the calibrated router for the manifest; None if there is no such router.
    """

    def renamed(name: str) -> str:
        return new if name == old else name

    _change_response(work, {renamed(name): name for name in work.manifest.expert_names})
    router, figures = _calibrated(work), work.manifest.router
    if router is None or figures is None:
        return figures
    features = {renamed(name): x for name, x in router.features.items()}
    save_router(work, replace(router, features=features))
    by_expert = {
        k: {renamed(n): v for n, v in figures[k].items()} for k in _BY_EXPERT if k in figures
    }
    return {**figures, "experts": [renamed(name) for name in figures["experts"]], **by_expert}


def remove_from_routers(work: Workspace, name: str, changed: Collection[str]) -> Figures:
    """Remove an expert from both routers. The calibrated one is fitted to the features of the other experts.

    Args:
        work: the artifact.
        name: the expert.
        changed: the names of the dense expert's weights that the removal changes.

    Returns:
        The figures of the calibrated router for the manifest; None if there is no such router, or if no two
        experts are left for it.
    """
    left = [other for other in work.manifest.expert_names if other != name]
    _change_response(work, {other: other for other in left})
    router, figures = _calibrated(work), work.manifest.router
    if router is None or figures is None:
        return figures
    if name in router.features:
        if len(router.features) < 3:
            _router_path(work).unlink()
            return None
        result = fit.remove(router, name)
        save_router(work, result.router)
        data = {other: value for other, value in figures["data"].items() if other != name}
        notes = {key: figures[key] for key in ("stale", OLD_DENSE) if key in figures}
        figures = {**result.figures, "data": data, **notes}
    is_old = bool(changed) and (router.kind == "hidden" or input_embedding(work.root) in changed)
    return {**figures, OLD_DENSE: True} if is_old else figures


def add_to_response(work: Workspace, name: str, directions: Mapping[str, Tensor]) -> None:
    """Add the row of a new expert to the response router.

    Args:
        work: the artifact.
        name: the expert.
        directions: by weight, `[rank, in]` float16, see `response.leading_directions`.
    """
    path = work.root / RESPONSE
    if not path.exists():
        return
    router = ResponseRouter.load(path)
    rows = {
        weight: torch.cat([present, directions[weight][None]])
        for weight, present in router.directions.items()
    }
    ResponseRouter((*router.experts, name), rows).save(path)


def with_stale_note(figures: Figures, experts: tuple[str, ...]) -> Figures:
    """State in the figures of a calibrated router whether it is stale, and how that shows.

    Args:
        figures: the figures, or None without a calibrated router.
        experts: the names of the artifact's experts.
    """
    if figures is None:
        return None
    figures = {key: value for key, value in figures.items() if key != "stale"}
    unknown = [name for name in experts if name not in figures["experts"]]
    if figures.get(OLD_DENSE):
        options = " ".join(f"--data {name}=FILE" for name in experts)
        return {
            **figures,
            "stale": "its features come from the dense expert before an expert was removed: run "
            f"`mergekit-mediator calibrate OUT {options}`",
        }
    if unknown:
        options = " ".join(f"--add {name}=FILE" for name in unknown)
        return {
            **figures,
            "stale": f"it chooses no {' or '.join(unknown)}, which it does not know: name the expert in "
            f"requests, or run `mergekit-mediator calibrate OUT {options}`",
        }
    return figures


def _change_response(work: Workspace, names: Mapping[str, str]) -> None:
    """Write the response router with these rows: present names by new ones."""
    path = work.root / RESPONSE
    if not path.exists():
        return
    router = ResponseRouter.load(path)
    rows = torch.tensor([router.experts.index(present) for present in names.values()])
    directions = {weight: x.index_select(0, rows) for weight, x in router.directions.items()}
    ResponseRouter(tuple(names), directions).save(path)


def _calibrated(work: Workspace) -> CalibratedRouter | None:
    path = _router_path(work)
    return CalibratedRouter.load(path) if path.is_file() else None


def save_router(work: Workspace, router: CalibratedRouter) -> None:
    """Write the router under its usual name, which it has unless a calibration was killed."""
    old = _router_path(work)
    router.save(work.root / ROUTER)
    if old != work.root / ROUTER:
        old.unlink()


def _router_path(work: Workspace) -> Path:
    return work.root / (work.manifest.router_file or ROUTER)
