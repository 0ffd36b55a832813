"""The least rank at which an adapter keeps enough of its expert's gain over the model that it is added to."""

from collections.abc import Callable
from dataclasses import replace

from mergekit_mediator.delta.kept import lost_of_left_out
from mergekit_mediator.export.adapter import Adapter
from mergekit_mediator.export.rank import AUTO_RANKS, RankChoice


def predicted_part(adapter: Adapter) -> float:
    """Predict the part of its expert's gain that an adapter keeps, in [0, 1], from the squared change it leaves out.

    It holds of narrow, broad and heavy experts, see `delta.kept.lost_of_left_out`: narrow ones keep more.
    """
    return _predicted(adapter, adapter.squared_error)


def least_rank(
    adapter: Adapter, keep: float, measure: Callable[[Adapter], float] | None = None
) -> Adapter:
    """Cut an adapter to the least of `AUTO_RANKS` at which it keeps a part of its expert's gain.

    What a rank keeps is predicted by `delta.kept` from the part of the modules' squared change that the rank leaves
    out, or measured. If no rank keeps enough, the largest is taken. Weights that no adapter holds have no part in it.

    Args:
        adapter: the expert's adapter, of at most the largest of `AUTO_RANKS`.
        keep: the part of the gain to keep, in (0, 1).
        measure: measures the part of the gain that an adapter keeps, at most 1.

    Returns:
        The adapter, with the choice.
    """
    errors = _squared_errors(adapter)
    for rank, error in zip(AUTO_RANKS, errors, strict=True):
        cut = None
        if measure is None:
            kept = _predicted(adapter, error)
        else:
            cut = _cut(adapter, rank)
            kept = measure(cut)
        if kept >= keep or rank == AUTO_RANKS[-1]:
            break
    choice = RankChoice(rank, keep, kept, measure is not None)
    return replace(cut or _cut(adapter, rank), choice=choice)


def rank_above_noise(adapter: Adapter, keep: float, directions: int) -> Adapter:
    """Cut an adapter of random signs to the least of `AUTO_RANKS` that holds every direction above their noise.

    More ranks would hold more noise. What a rank keeps does not follow from the squared change that it leaves out, because
    most of that is noise: it is neither predicted nor compared with `keep`.

    Args:
        adapter: the expert's adapter, of at most the largest of `AUTO_RANKS`.
        keep: the part of the gain that was asked for.
        directions: the most that stand out of the noise of any module, see `directions_above_noise`.

    Returns:
        The adapter, with the choice.
    """
    rank = next((rank for rank in AUTO_RANKS if rank >= directions), AUTO_RANKS[-1])
    return replace(_cut(adapter, rank), choice=RankChoice(rank, keep, None, False))


def _predicted(adapter: Adapter, error: float) -> float:
    """Predict what is kept where so much of the squared change is left out."""
    return 1 - float(lost_of_left_out(error, adapter.change_over_base))


def _squared_errors(adapter: Adapter) -> list[float]:
    """Compute the part of the modules' squared change that each of `AUTO_RANKS` leaves out."""
    products = [factors.low_rank for factors in adapter.modules.values()]
    errors = zip(*(product.squared_errors(AUTO_RANKS) for product in products), strict=True)
    norm = adapter.squared_norm
    return [sum(of_rank) / norm if norm else 0.0 for of_rank in errors]


def _cut(adapter: Adapter, rank: int) -> Adapter:
    """Cut every module to a rank."""
    modules = {
        module: replace(factors, low_rank=factors.low_rank.cut(rank))
        for module, factors in adapter.modules.items()
    }
    return replace(adapter, modules=modules)
