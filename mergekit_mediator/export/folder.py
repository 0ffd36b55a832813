"""A folder of adapters, one for each expert, and the figures of each adapter."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.export.adapter import Adapter, write_peft
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.new_folder import new_folder
from mergekit_mediator.export.peft_lora import Holdable, to_adapter


@dataclass(frozen=True)
class ExportedExpert:
    """The figures of an expert's adapter.

    Attributes:
        name: the name of the expert and of the adapter's folder.
        rank: the largest rank of a module.
        modules: the last parts of the changed modules' names, such as `q_proj`.
        error: the part of the modules' squared change that the rank leaves out, in [0, 1].
        dropped: the number of changed weights that no adapter holds: norms, biases, weights without a module.
        dropped_part: the dropped weights' part of the whole squared change, in [0, 1].
        bytes: the bytes of the adapter's files.
    """

    name: str
    rank: int
    modules: tuple[str, ...]
    error: float
    dropped: int
    dropped_part: float
    bytes: int

    @classmethod
    def of(cls, name: str, adapter: Adapter, folder: Path) -> "ExportedExpert":
        """Collect the figures of an adapter.

        Args:
            name: the expert's name.
            adapter: the adapter.
            folder: the folder of the adapter's files.
        """
        whole = adapter.squared_norm + adapter.dropped_energy
        return cls(
            name,
            adapter.rank,
            tuple(sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})),
            adapter.squared_error,
            len(adapter.dropped),
            adapter.dropped_energy / whole if whole else 0.0,
            sum(path.stat().st_size for path in folder.iterdir()),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


def export_adapters(
    experts: StoredExperts,
    out: Path,
    rank: int,
    names: Sequence[str] | None = None,
    one_rank: bool = False,
) -> list[ExportedExpert]:
    """Write an adapter for each expert to a new folder, which appears when all adapters are written.

    Args:
        experts: the experts of an artifact whose files are verified.
        out: the folder; it must be absent or empty.
        rank: the largest rank of a module.
        names: the experts to export; None for all.
        one_rank: give every module of an adapter the same rank.

    Returns:
        The figures of each adapter.

    Raises:
        ExportError: the folder is not empty or cannot be written, an expert is unknown or changes no module,
            or the rank is below 1.
    """
    holdable = Holdable.of(experts.root)
    base = experts.manifest.base.source if experts.reference == "base" else str(experts.root)
    dtype = experts.dense.weight(experts.weights[0]).dtype
    exported = []
    with new_folder(out) as folder:
        for name in experts.names if names is None else dict.fromkeys(names):
            adapter = to_adapter(experts, {name: 1.0}, rank, holdable)
            written = adapter.of_one_rank() if one_rank else adapter
            write_peft(written, folder / name, base, dtype)
            exported.append(ExportedExpert.of(name, adapter, folder / name))
    return exported
