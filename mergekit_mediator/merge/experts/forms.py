"""The form of each expert that is stored by a rate: the one that `values` names, or the one that `keep` needs fewer bits in.

Forms are compared on some of the weights. A decomposition takes more time than all else, and an expert that becomes random
signs needs none.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.loss_law import LAWS
from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.estimate import Size
from mergekit_mediator.merge.experts.costs import Costs
from mergekit_mediator.merge.measured import Measured
from mergekit_mediator.merge.passes import Passes
from mergekit_mediator.merge.planner import PlannedWeight

Forms = Mapping[ModelReference, RateForm]

# One of so many weights of a size is compared. Layers repeat two or three weights of a size, and no such number divides it.
_EVERY = 7


def compared_names(
    config: MediatorConfig, names: Sequence[str], sizes: Mapping[str, Size]
) -> frozenset[str] | None:
    """Name the weights whose costs are measured in every form; None for all, if there is no choice of forms.

    Args:
        config: the configuration of the merge.
        names: the names of the weights that are routed.
        sizes: the sizes of the dense expert's weights by name.
    """
    if len(config.rate_forms) == 1:
        return None
    alike = _of_one_size(names, sizes)
    return frozenset(name for group in alike.values() for name in group[::_EVERY])


def choose_forms(
    config: MediatorConfig,
    names: Sequence[str],
    measured: Mapping[str, Measured],
    sizes: Mapping[str, Size],
    keep: float | None = None,
) -> Forms:
    """Choose the form of every expert.

    Where there is a choice, it is the form that is predicted to keep enough in fewer bits. Low rank plus sparse, which
    keeps any part at some rate, is taken where random signs cannot keep enough: their noise does not fall below what one
    sign for each number leaves.

    Args:
        config: the configuration of the merge.
        names: the names of the routed weights.
        measured: the figures of each weight by name, with costs. Those that have them in every form stand for the others
            of their size.
        sizes: the sizes of the dense expert's weights by name.
        keep: the part in (0, 1) that every expert shall keep; that of the configuration unless given.
    """
    first, *others = config.rate_forms
    models = list(config.experts)
    forms = dict.fromkeys(models, first)
    keep = config.keep if keep is None else keep
    if keep is None or not others:
        return forms
    compared = _standing_for_all(names, measured, sizes)
    for i, model in enumerate(models if compared else ()):
        fewest = _bits(first, keep, i, compared)
        for form in others:
            bits = _bits(form, keep, i, compared)
            if bits < fewest:
                fewest, forms[model] = bits, form
    return forms


def complete(
    passes: Passes,
    weights: Sequence[PlannedWeight],
    measured: Mapping[str, Measured],
    forms: Forms,
) -> dict[str, Measured]:
    """Measure those costs in the chosen forms that the comparison left out.

    Args:
        passes: the passes over the models.
        weights: the routed weights.
        measured: the figures of each weight by name.
        forms: the form of each expert.

    Raises:
        InputError: see `Passes.measure`.
    """
    all_measured = dict(measured)
    low_rank = {model: i for i, model in enumerate(forms) if forms[model] == "low_rank"}

    def lacks(weight: PlannedWeight) -> bool:
        costs = measured[weight.info.name].costs
        return bool(costs) and any("low_rank" not in costs[i] for i in low_rank.values())

    missing = [weight for weight in weights if low_rank and lacks(weight)]
    for weight, found in passes.measure_low_rank(missing, list(low_rank)):
        known = all_measured[weight.info.name]
        costs = list(known.costs)
        for model, of_expert in found.items():
            costs[low_rank[model]] = {**costs[low_rank[model]], "low_rank": of_expert}
        all_measured[weight.info.name] = replace(known, costs=tuple(costs))
    return all_measured


def _of_one_size(names: Sequence[str], sizes: Mapping[str, Size]) -> dict[int, list[str]]:
    """Group weights by the number of their parameters."""
    groups = defaultdict(list)
    for name in names:
        groups[sizes[name].numel].append(name)
    return groups


def _standing_for_all(
    names: Sequence[str], measured: Mapping[str, Measured], sizes: Mapping[str, Size]
) -> list[tuple[float, tuple[Costs, ...]]]:
    """The costs of the weights that have them in every form, and for how many weights each stands."""
    costed = [name for name in names if measured[name].costs]
    standing = []
    for group in _of_one_size(costed, sizes).values():
        # there may be none of a size, where a buffer has the place of the one that was to be compared
        whole = [n for n in group if all("low_rank" in costs for costs in measured[n].costs)]
        standing += [(len(group) / len(whole), measured[name].costs) for name in whole]
    return standing


def _bits(
    form: RateForm,
    keep: float,
    expert: int,
    compared: Sequence[tuple[float, tuple[Costs, ...]]],
) -> float:
    """Predict the bits that an expert needs in a form; infinity if the form cannot keep enough."""
    total = torch.stack([count * costs[expert][form] for count, costs in compared]).sum(dim=0)
    allocation = Allocation([total], laws=[LAWS[form]])
    slopes = allocation.slopes_to_keep([keep])
    return allocation.spent(slopes) if allocation.kept(slopes)[0] >= keep else float("inf")


def allocation_of(
    forms: Forms,
    names: Sequence[str],
    measured: Mapping[str, Measured],
    divergences: Sequence[Mapping[float, float]] = (),
) -> Allocation:
    """Make the allocation of experts in their forms.

    Args:
        forms: the form of each expert, in the order of the configuration.
        names: the names of the routed weights.
        measured: the figures of each weight by name, with costs.
        divergences: of each expert, what prompts measured, see `Allocation`.
    """
    costs = tradeoffs(names, measured, list(forms.values()))
    return Allocation(costs, divergences, [LAWS[form] for form in forms.values()])


def tradeoffs(
    names: Sequence[str], measured: Mapping[str, Measured], forms: Sequence[RateForm]
) -> list[Tensor]:
    """Sum the costs of the named weights for each expert in its form, in the order of the configuration.

    Each sum is `[4, n_slopes]` float64: bits, the squared error that remains, that of storing nothing, and the squared
    norm of the base; see `delta.tradeoff`.
    """
    costs = [measured[name].costs for name in names if measured[name].costs]
    return [
        torch.stack([of_weight[i][form] for of_weight in costs]).sum(dim=0)
        for i, form in enumerate(forms)
    ]
