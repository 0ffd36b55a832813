"""The static merge methods that an artifact is compared with, and what is tried of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StaticMethod:
    """A merge method that gives one checkpoint, and what is tried of it.

    Attributes:
        method: its name in mergekit.
        parameters: of each merge.
        factors: of the merged task vector. One merge serves all of them.
        needs_prompts: whether every expert needs prompts of its task.
    """

    method: str
    parameters: tuple[Mapping[str, Any], ...] = ({},)
    factors: tuple[float, ...] = (1.0,)
    needs_prompts: bool = False


AVERAGE = "average"
SCALES = (0.5, 1.0, 1.5)
# What mergekit's examples and the methods' papers try. benchmarks/results/methods.json says what each keeps:
# those that keep less than `ties` there are no rivals, unless people know them well.
STATIC: Mapping[str, StaticMethod] = {
    AVERAGE: StaticMethod("linear", ({"weight": 1.0},)),
    "task_arithmetic": StaticMethod(
        "task_arithmetic", ({"weight": 1.0, "normalize": False},), (0.2, 0.3, 0.5, 1.0)
    ),
    "ties": StaticMethod(
        "ties", tuple({"weight": 1.0, "density": d} for d in (0.2, 0.5)), (1.0, 1.5)
    ),
    "dare_ties": StaticMethod(
        "dare_ties", ({"weight": 1.0, "density": 0.5, "normalize": False},), (0.3, 0.5)
    ),
    "della": StaticMethod(
        "della",
        ({"weight": 1.0, "density": 0.5, "epsilon": 0.1, "normalize": False},),
        (0.3, 0.5),
    ),
    "tsvm": StaticMethod("tsvm", factors=SCALES),
    "r_tsvm": StaticMethod("r_tsvm", factors=SCALES),
    "iso_c": StaticMethod("iso_c", factors=SCALES),
    "wudi": StaticMethod("wudi", factors=(0.5, 1.0)),
    "opcm": StaticMethod("opcm", factors=SCALES),
    "pcb": StaticMethod("pcb", tuple({"density": d, "lambda": 1.2} for d in (0.1, 0.2))),
    "regmean_pp": StaticMethod("regmean_pp", factors=(0.8, 1.0, 1.2), needs_prompts=True),
}
