"""The names of experts in an artifact, and the figures that a manifest has by name."""

import re
from collections.abc import Mapping
from typing import Any

from mergekit_mediator.errors import EditError
from mergekit_mediator.store.manifest import EXPERT_NAME, Manifest

# The parameters of a manifest that hold a figure for each expert.
_BY_EXPERT = ("slopes", "forms", "kept")


def check_new_name(name: str, manifest: Manifest, replaced: str | None = None) -> None:
    """Refuse a name that an expert cannot have.

    Args:
        name: the new name.
        manifest: the manifest of the artifact.
        replaced: the present name of the expert that gets the new one; None if the expert is new.

    Raises:
        EditError: the name has other characters than names may have, such as capital letters, or an expert has
            it already.
    """
    if not re.fullmatch(EXPERT_NAME, name):
        raise EditError(
            f"expert name {name!r}: 1 to 64 characters of a-z 0-9 . _ - required, the first a letter or digit: "
            "choose another name"
        )
    if name in (present for present in manifest.expert_names if present != replaced):
        raise EditError(f"expert name {name!r}: another expert has it: choose another name")
    if name == replaced:
        raise EditError(f"expert name {name!r}: the expert has it already: choose another name")


def parameters_of(parameters: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a manifest's parameters with the figures of some experts alone.

    Args:
        parameters: the parameters of the manifest; some hold a figure for each expert.
        names: the new name of each expert by its present one.
    """
    figures = {
        key: {names[name]: figure for name, figure in parameters[key].items() if name in names}
        for key in _BY_EXPERT
        if key in parameters
    }
    return {**parameters, **figures}
