"""The rank of adapters as a user asks for it, and what `auto` chose."""

import sys
from dataclasses import dataclass

from mergekit_mediator.errors import ExportError

# The ranks that `auto` chooses from. Engines pad to such ranks.
AUTO_RANKS = (8, 16, 32, 64, 128, 256)
# The part of its expert's gain that an adapter of the rank `auto` keeps, whatever the expert was trained on. Adapters of
# narrow experts that are predicted to keep so much kept 99.8% and more (benchmarks/exported_ranks.py); 99.9% takes ranks
# whose adapters are as large as a model.
AUTO_KEEP = 0.995
_ALLOWED = (
    "a rank such as 64, a part of the squared change such as 0.99, or `auto` (or `auto:0.99`, with the part of the "
    "gain to keep) is required"
)


@dataclass(frozen=True)
class Rank:
    """The rank of adapters.

    Attributes:
        largest: the largest rank of a module.
        energy: the part in (0, 1] of each module's squared change that is enough.
        keep: the part in (0, 1) of its expert's gain that an adapter keeps at the rank that is chosen for it, see
            `auto_rank.least_rank`; None to choose nothing.
    """

    largest: int = sys.maxsize
    energy: float = 1.0
    keep: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Rank":
        """Read `64`, `0.99`, `auto` or `auto:0.99`.

        Raises:
            ExportError: the text is none of these.
        """
        word, _, part = text.partition(":")
        if word == "auto":
            return cls(AUTO_RANKS[-1], keep=_part(part, text) if part else AUTO_KEEP)
        if text.isdecimal() and int(text):
            return cls(int(text))
        return cls(energy=_part(text, text))


@dataclass(frozen=True)
class RankChoice:
    """Why `auto` chose the rank of an adapter.

    Attributes:
        rank: the rank, one of `AUTO_RANKS`. An adapter that needs less has less.
        keep: the part of the gain that was asked for, in (0, 1).
        kept: the part of the gain that the adapter keeps at this rank, at most 1; None where neither the prediction nor
            a measurement tells, see `auto_rank.rank_above_noise`.
        is_measured: whether `kept` is measured on prompts; else it is predicted from the squared change left out.
    """

    rank: int
    keep: float
    kept: float | None
    is_measured: bool

    def __str__(self) -> str:
        """Say the rank, and what it keeps."""
        if self.kept is None:
            return f"{self.rank} (holds every direction above the noise of its signs; --prompts would measure it)"
        how = "measured" if self.is_measured else "predicted"
        short = "" if self.kept >= self.keep else f", less than {self.keep:.2%}"
        return f"{self.rank} ({how} to keep {self.kept:.2%}{short})"


def _part(part: str, text: str) -> float:
    """Read a number between 0 and 1.

    Raises:
        ExportError: the part is no such number.
    """
    try:
        number = float(part)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise ExportError(f"{_ALLOWED}, got {text!r}")
    return number
