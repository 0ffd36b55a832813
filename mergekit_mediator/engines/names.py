"""The names of mixtures on an engine, where every mixture is one adapter.

`dense` names the dense expert, `math` an expert, and `math=0.625,code=0.375` a blend. Weights are multiples of
a small fraction, so that requests share blends and an engine can batch them.
"""

import math
import zlib
from collections.abc import Sequence

from mergekit_mediator.errors import EngineError, MixtureError
from mergekit_mediator.serve.mixture import DENSE, DENSE_NAME, Mixture

AUTO = "auto"


def rounded(mixture: Mixture, grid: int) -> Mixture:
    """Return the nearest mixture whose weights are multiples of 1/grid.

    The total is rounded first. Then the weights with the largest remainders are rounded up, as many as the
    total needs.
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
    """Return the name of a mixture; `parse` turns it back into the mixture."""
    if mixture.is_dense:
        return DENSE_NAME
    return mixture.alone or ",".join(f"{name}={p:.6g}" for name, p in mixture.weights)


def parse(name: str, experts: Sequence[str], grid: int) -> Mixture | None:
    """Read the mixture that a client names, and round its weights.

    Args:
        name: the client's model name, such as `math`, `dense` or `math=0.5,code=0.5`. Weights that sum to
            more than 1 are divided by their sum.
        experts: the artifact's experts, in its order.
        grid: weights become multiples of 1/grid.

    Returns:
        The mixture; None if the name is neither an expert, nor `dense`, nor a blend.

    Raises:
        MixtureError: a blend has an unknown expert, or a weight that is no number or negative; or all
            weights are rounded to 0.
    """
    if name in experts or name == DENSE_NAME:
        return Mixture.of(name, experts)
    if "=" not in name:
        return None
    weights: dict[str, float] = {}
    for part in name.split(","):
        expert, *texts = (text.strip() for text in part.split("="))
        if len(texts) != 1 or not expert:
            raise MixtureError(
                f"{name!r}: an expert's name or weights such as math=0.5,code=0.5 are required"
            )
        try:
            weights[expert] = weights.get(expert, 0.0) + float(texts[0])
        except ValueError as error:
            raise MixtureError(
                f"{name!r}: the weight of {expert!r} must be a number, got {texts[0]!r}"
            ) from error
    mixture = Mixture.of(weights, experts)
    if mixture.total > 1 + 1e-6:
        mixture = Mixture(tuple((n, p / mixture.total) for n, p in mixture.weights))
    near = rounded(mixture, grid)
    if near == DENSE:
        raise MixtureError(
            f"{name!r}: a weight of at least {1 / (2 * grid):g} is required, because weights are rounded "
            f"to multiples of 1/{grid}: name larger weights, or `dense`"
        )
    return near


def check_names(experts: Sequence[str]) -> None:
    """Refuse experts whose names mean something else on engines.

    Raises:
        EngineError: an expert is called `auto` or `dense`.
    """
    for name in (AUTO, DENSE_NAME):
        if name in experts:
            raise EngineError(
                f"expert {name!r}: on engines `auto` names routing and `dense` the dense expert: merge "
                "again with another name for this expert"
            )


def adapter_id(digest: str, name: str) -> int:
    """Return the number of an adapter, from 1 to 2³¹ − 1, which is the same in every server and replica.

    Args:
        digest: the digest of the artifact's manifest.
        name: the mixture's name.
    """
    return zlib.crc32(f"{digest} {name}".encode()) % (2**31 - 1) + 1
