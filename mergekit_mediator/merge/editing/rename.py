"""Rename an expert of an artifact."""

from pathlib import Path

from mergekit_mediator.merge.editing.names import check_new_name, parameters_of
from mergekit_mediator.merge.editing.routers import rename_in_routers, with_stale_note
from mergekit_mediator.merge.editing.workspace import Edited, change, editing
from mergekit_mediator.store.expert_file import ExpertWriter


def rename_expert(out: Path, old: str, new: str) -> Edited:
    """Rename an expert, in its file, in the manifest and in the routers. What it stores stays bit for bit.

    Args:
        out: the artifact's directory.
        old: the present name.
        new: the new name.

    Returns:
        The manifest of the changed artifact, and the change.

    Raises:
        EditError: the artifact has no expert `old`, or the new name cannot be used.
        ArtifactError: the artifact does not verify.
        OutputError: the artifact cannot be written. After any error it is as before.
    """
    with editing(out) as work:
        entry = work.entry(old)
        check_new_name(new, work.manifest, replaced=old)
        renamed = entry.model_copy(update={"name": new, "file": f"experts/{new}.safetensors"})
        file, writer = work.files[old], ExpertWriter(work.path(renamed), new)
        try:
            for weight, description in file.weights.items():
                writer.append(weight, file.stream(weight), description)
            writer.close()
        finally:
            writer.abandon()
        work.path(entry).unlink()
        experts = tuple(renamed if e.name == old else e for e in work.manifest.experts)
        router = rename_in_routers(work, old, new)
        names = {name: new if name == old else name for name in work.manifest.expert_names}
        parameters = parameters_of(work.manifest.parameters, names)
        manifest = work.manifest.model_copy(
            update={
                "experts": experts,
                "parameters": parameters,
                "router": with_stale_note(router, tuple(e.name for e in experts)),
            }
        )
        note = f"expert {old} was renamed to {new}"
        return work.publish(manifest, change("rename", old, note, new_name=new))
