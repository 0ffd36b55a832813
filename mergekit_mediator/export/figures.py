"""The figures of an exported adapter: its rank, its size, and the parts of the expert's change that it leaves out."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.export.adapter import Adapter


@dataclass(frozen=True)
class ExportedExpert:
    """The figures of an expert's adapter.

    Attributes:
        name: the name of the expert and of the adapter's folder.
        rank: the largest rank of a module.
        modules: the last parts of the changed modules' names, such as `q_proj`.
        error: the part of the modules' squared change that the rank leaves out, in [0, 1].
        dropped: the names of the changed weights that no adapter holds: norms, biases, weights without a module.
        dropped_part: the part of the whole squared change, in [0, 1], that the served model lacks in these
            weights. With the mean of the experts baked in, it is the squared distance from the mean.
        bytes: the bytes of the adapter's files.
    """

    name: str
    rank: int
    modules: tuple[str, ...]
    error: float
    dropped: tuple[str, ...]
    dropped_part: float
    bytes: int

    @classmethod
    def of(cls, name: str, adapter: Adapter, lacking: float, folder: Path) -> "ExportedExpert":
        """Collect the figures of an adapter.

        Args:
            name: the expert's name.
            adapter: the adapter.
            lacking: the squared distance of the expert's dropped weights from those of the served model.
            folder: the folder of the adapter's files.
        """
        return cls(
            name,
            adapter.rank,
            tuple(sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})),
            adapter.squared_error,
            adapter.dropped,
            lacking / adapter.whole if adapter.whole else 0.0,
            sum(path.stat().st_size for path in folder.iterdir()),
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
