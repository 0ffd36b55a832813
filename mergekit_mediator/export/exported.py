"""The figures of an exported adapter, and the refusal of what it would leave out."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter
from mergekit_mediator.export.answers import AnswerError
from mergekit_mediator.export.peft_shira import SparseAdapter


@dataclass(frozen=True)
class ExportedExpert:
    """The figures of an expert's adapter.

    Attributes:
        name: the name of the expert and of the adapter's folder.
        rank: the largest rank of a module.
        modules: the last parts of the changed modules' names, such as `q_proj`.
        error: the part of the modules' squared change that the rank leaves out, in [0, 1].
        dropped: the number of changed weights that no adapter of this form holds, such as norms and biases.
        dropped_part: the dropped weights' part of the whole squared change, in [0, 1].
        bytes: the bytes of the adapter's settings and weights.
        answers: how far the adapter's answers are from the expert's; None without prompts.
    """

    name: str
    rank: int
    modules: tuple[str, ...]
    error: float
    dropped: int
    dropped_part: float
    bytes: int
    answers: AnswerError | None = None

    @classmethod
    def of(
        cls,
        name: str,
        adapter: Adapter | SparseAdapter,
        folder: Path,
        answers: AnswerError | None = None,
    ) -> "ExportedExpert":
        """Collect the figures of an adapter.

        Args:
            name: the expert's name.
            adapter: the adapter.
            folder: the folder of the adapter's files.
            answers: how far the adapter's answers are from the expert's.
        """
        return cls(
            name,
            adapter.rank,
            tuple(sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})),
            adapter.squared_error,
            len(adapter.dropped),
            dropped_part(adapter),
            sum(path.stat().st_size for path in folder.iterdir()),
            answers,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


def dropped_part(adapter: Adapter | SparseAdapter) -> float:
    """Return the dropped weights' part of an expert's whole squared change, in [0, 1]."""
    whole = adapter.squared_norm + adapter.dropped_energy
    return adapter.dropped_energy / whole if whole else 0.0


def refuse_dropped(name: str, adapter: Adapter | SparseAdapter) -> None:
    """Refuse an adapter that lacks weights which its expert changes.

    Args:
        name: the expert's name.
        adapter: the expert's adapter.

    Raises:
        ExportError: the adapter lacks a weight.
    """
    if adapter.dropped:
        first, count = ", ".join(adapter.dropped[:3]), len(adapter.dropped)
        more = f" and {count - 3} more" if count > 3 else ""
        raise ExportError(
            f"expert {name!r}: it changes {count} weights that {adapter.lacks} "
            f"({first}{more}), {dropped_part(adapter):.2%} of its squared change: leave them out with --drop, or "
            "export a checkpoint"
        )
