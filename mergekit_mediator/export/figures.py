"""The figures of an exported adapter, and the refusal of what it would leave out."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter
from mergekit_mediator.export.answers import AnswerError
from mergekit_mediator.export.peft_shira import SparseAdapter
from mergekit_mediator.export.rank import AUTO_RANKS, RankChoice


@dataclass(frozen=True)
class ExportedExpert:
    """The figures of an expert's adapter.

    Attributes:
        name: the name of the expert and of the adapter's file or folder.
        rank: the largest rank of a module.
        modules: the last parts of the changed modules' names, such as `q_proj`.
        error: the part of the modules' squared change that the rank leaves out, in [0, 1].
        dropped: the names of the changed weights that no adapter holds: norms, biases, weights without a module.
        dropped_part: the part of the whole squared change, in [0, 1], that the served model lacks in these
            weights. With the mean of the experts baked in, it is the squared distance from the mean.
        bytes: the bytes of the adapter's settings and weights.
        answers: how far the adapter's answers are from the expert's; None without prompts.
        choice: why the rank is what it is, if it was chosen.
    """

    name: str
    rank: int
    modules: tuple[str, ...]
    error: float
    dropped: tuple[str, ...]
    dropped_part: float
    bytes: int
    answers: AnswerError | None = None
    choice: RankChoice | None = None

    @classmethod
    def of(
        cls,
        name: str,
        adapter: Adapter | SparseAdapter,
        lacking: float,
        path: Path,
        answers: AnswerError | None = None,
    ) -> "ExportedExpert":
        """Collect the figures of an adapter.

        Args:
            name: the expert's name.
            adapter: the adapter.
            lacking: the squared distance of the expert's dropped weights from those of the served model.
            path: the adapter's file, or the folder of its files.
            answers: how far the adapter's answers are from the expert's.
        """
        whole = adapter.squared_norm + adapter.dropped_energy
        return cls(
            name,
            adapter.rank,
            tuple(sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})),
            adapter.squared_error,
            adapter.dropped,
            lacking / whole if whole else 0.0,
            sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])),
            answers,
            adapter.choice if isinstance(adapter, Adapter) else None,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)

    def cells(self) -> list[str]:
        """Return the figures as texts, in the order of `COLUMNS`."""
        return [
            self.name,
            str(self.rank),
            f"{100 * self.error:.2f}",
            str(len(self.dropped)),
            f"{100 * self.dropped_part:.2f}",
        ]


# The columns of a table of adapters.
COLUMNS = ("adapter", "rank", "left out by the rank, %", "weights left out", "of the change, %")


def said_of_ranks(exported: Sequence[ExportedExpert]) -> str:
    """Say which ranks were chosen and why; an empty text if none was chosen."""
    choices = [(expert.name, expert.choice) for expert in exported if expert.choice]
    ranks = ", ".join(map(str, AUTO_RANKS))
    known = [f"{name} {choice}" for name, choice in choices if choice.kept is not None]
    noisy = [f"{name} {choice.rank}" for name, choice in choices if choice.kept is None]
    said = []
    if known:
        said.append(
            f"Each rank is the least of {ranks} at which the matrices keep {choices[0][1].keep:.2%} of what the expert "
            f"gains over the model that the adapter is added to: {', '.join(known)}."
        )
    if noisy:
        said.append(
            f"Each rank is the least of {ranks} that holds every direction above the noise of random signs: "
            f"{', '.join(noisy)}. Most of what it leaves out is noise, so what it keeps is not predicted: --prompts "
            "measure it."
        )
    return " ".join(said)


def left_out(exported: Sequence[ExportedExpert]) -> tuple[str, ...]:
    """Return the names of the weights that any of the adapters leaves out, each once."""
    return tuple(dict.fromkeys(name for expert in exported for name in expert.dropped))


def counted(weights: Sequence[str]) -> list[str]:
    """Name weights of all blocks at once, with their number.

    >>> counted(["model.layers.0.norm.weight", "model.layers.1.norm.weight", "model.norm.weight"])
    ['model.layers.*.norm.weight (2)', 'model.norm.weight']
    """
    patterns = Counter(re.sub(r"\.\d+(?=\.)", ".*", weight) for weight in weights)
    return [f"{name} ({count})" if count > 1 else name for name, count in patterns.items()]


def refuse_dropped(name: str, adapter: Adapter | SparseAdapter) -> None:
    """Refuse an adapter that lacks weights which its expert changes.

    Args:
        name: the expert's name.
        adapter: the expert's adapter.

    Raises:
        ExportError: the adapter lacks a weight.
    """
    if not adapter.dropped:
        return
    first, count = ", ".join(adapter.dropped[:3]), len(adapter.dropped)
    more = f" and {count - 3} more" if count > 3 else ""
    part = adapter.dropped_energy / (adapter.squared_norm + adapter.dropped_energy)
    raise ExportError(
        f"expert {name!r}: it changes {count} weights that {adapter.lacks} ({first}{more}), {part:.2%} of its "
        "squared change: leave them out with --drop, or export a checkpoint"
    )
