"""The names that mixtures have on an engine, where every mixture is an adapter of its own.

`dense` is the dense expert, `math` one expert, `math=0.625,code=0.375` a blend. Weights are multiples of a
small fraction, so that requests share blends and an engine can batch them.
"""

import math
import re
import zlib
from collections.abc import Sequence

from mergekit_mediator.errors import EngineError, MixtureError
from mergekit_mediator.serve.mixture import DENSE, DENSE_NAME, Mixture

AUTO = "auto"
_PART = re.compile(r"\s*([^=,]+?)\s*=\s*([^=,]*?)\s*")


def rounded(mixture: Mixture, grid: int) -> Mixture:
    """The nearest mixture whose weights are multiples of 1/grid.

    The total is rounded first and kept; the largest remainders are rounded up.
    """
    exact = [p * grid for _, p in mixture.weights]
    steps = [math.floor(x) for x in exact]
    missing = math.floor(sum(exact) + 0.5) - sum(steps)
    by_remainder = sorted(range(len(exact)), key=lambda i: (steps[i] - exact[i], i))
    for i in by_remainder[:missing]:
        steps[i] += 1
    names = [name for name, _ in mixture.weights]
    return Mixture.of_row([step / grid for step in steps], names)


def name_of(mixture: Mixture) -> str:
    """The one name of a mixture; `parse` gives it back."""
    if mixture.is_dense:
        return DENSE_NAME
    return mixture.alone or ",".join(f"{name}={p:.6g}" for name, p in mixture.weights)


def parse(name: str, experts: Sequence[str], grid: int) -> Mixture | None:
    """The mixture that a client names, with rounded weights; None for a name of another form.

    Raises:
        MixtureError: an unknown expert in a blend, or weights that are no numbers, negative, or all
            less than half a step.
    """
    if name in experts or name == DENSE_NAME:
        return Mixture.of(name, experts)
    if "=" not in name:
        return None
    weights: dict[str, float] = {}
    for part in name.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise MixtureError(f"{name!r}: weights such as math=0.5,code=0.5 required")
        try:
            weights[match[1]] = weights.get(match[1], 0.0) + float(match[2])
        except ValueError as error:
            raise MixtureError(
                f"{name!r}: weight of {match[1]!r} is no number: {match[2]!r}"
            ) from error
    mixture = Mixture.of(weights, experts)
    if mixture.total > 1 + 1e-6:
        mixture = Mixture(tuple((n, p / mixture.total) for n, p in mixture.weights))
    near = rounded(mixture, grid)
    if near == DENSE:
        raise MixtureError(f"{name!r}: weights are rounded to multiples of 1/{grid}: none is left")
    return near


def check_names(experts: Sequence[str]) -> None:
    """Refuse names of experts that mean something else here.

    Raises:
        EngineError: an expert that is called `auto` or `dense`.
    """
    for name in (AUTO, DENSE_NAME):
        if name in experts:
            raise EngineError(
                f"expert {name!r}: on engines `auto` is routing and `dense` the dense expert: merge "
                "again with another name for this expert"
            )


def adapter_id(digest: str, name: str) -> int:
    """The number of an adapter, from 1 to 2³¹ − 1: the same in every server and replica.

    Args:
        digest: of the artifact's manifest.
        name: of the mixture.
    """
    return zlib.crc32(f"{digest} {name}".encode()) % (2**31 - 1) + 1
