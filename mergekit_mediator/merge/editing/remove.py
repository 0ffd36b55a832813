"""Remove an expert from an artifact, and say where it stays."""

from pathlib import Path

from mergekit_mediator.errors import EditError
from mergekit_mediator.merge.editing.dense import take_share_out
from mergekit_mediator.merge.editing.names import parameters_of
from mergekit_mediator.merge.editing.routers import remove_from_routers, with_stale_note
from mergekit_mediator.merge.editing.workspace import Edited, Workspace, change, editing


def remove_expert(out: Path, name: str) -> Edited:
    """Remove an expert: its file, its rows in the routers, and its entry in the manifest.

    The mixtures of the other experts stay as they are. If experts are stored relative to the base, these
    mixtures subtract the removed expert's share from the dense expert; the dense expert's weights lose this share
    instead. The change says where the expert stays.

    Args:
        out: the artifact's directory.
        name: the expert.

    Returns:
        The manifest of the changed artifact, and the change.

    Raises:
        EditError: the artifact has no such expert, or no other one.
        ArtifactError: the artifact does not verify.
        OutputError: the artifact cannot be written. After any error it is as before.
    """
    with editing(out) as work:
        entry = work.entry(name)
        if len(work.manifest.experts) == 1:
            raise EditError(
                f"{out}: {name} is the last expert, and an artifact has at least one: remove the directory instead"
            )
        note = f"expert {name} was removed: {where_it_stays(work, name)}"
        changed = take_share_out(work, name)
        work.path(entry).unlink()
        experts = tuple(e for e in work.manifest.experts if e.name != name)
        left = {e.name: e.name for e in experts}
        router = remove_from_routers(work, name, changed)
        manifest = work.manifest.model_copy(
            update={
                "experts": experts,
                "parameters": parameters_of(work.manifest.parameters, left),
                "router": with_stale_note(router, tuple(left)),
            }
        )
        return work.publish(manifest, change("remove", name, note, dense_weights=len(changed)))


def where_it_stays(work: Workspace, name: str) -> str:
    """Tell in a clause where an expert stays after its removal: in the average of which layers.

    Args:
        work: the artifact, with the expert.
        name: the expert.
    """
    manifest = work.manifest
    if work.entry(name).weight == 0:  # such as an expert that was added after the merge
        return "the dense expert never held it"
    if manifest.merged_by is not None:
        return f"the dense expert, a merge of all by {manifest.merged_by}, still holds it"
    averaged = sum(not layer.routed for layer in manifest.layers)
    stays = f"the average of {averaged} averaged layers still holds it" if averaged else ""
    if manifest.parameters.get("reference") == "base":
        return stays or "no layer holds it now"
    if any(d.share for d in work.files[name].weights.values()):
        taken = (
            "the dense expert of the routed layers holds only that part of it that was not stored"
        )
        return f"{stays}; {taken}" if stays else taken
    return f"the average of all {len(manifest.layers)} layers, the dense expert, still holds it"
