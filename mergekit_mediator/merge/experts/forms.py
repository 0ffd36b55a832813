"""The form of each expert that is stored by a rate: the one that `values` names, or the one that `keep` needs fewer bits in."""

from collections.abc import Mapping, Sequence

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.allocation import Allocation
from mergekit_mediator.delta.loss_law import LAWS
from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.passes import Measured

Forms = Mapping[ModelReference, RateForm]


def choose_forms(
    config: MediatorConfig,
    names: Sequence[str],
    measured: Mapping[str, Measured],
    keep: float | None = None,
) -> Forms:
    """Choose the form of every expert.

    Where there is a choice, it is the form that is predicted to keep enough in fewer bits. Low rank plus sparse, which
    keeps any part at some rate, is taken where random signs cannot keep enough: their noise does not fall below what one
    sign for each number leaves.

    Args:
        config: the configuration of the merge.
        names: the names of the routed weights.
        measured: the figures of each weight by name, with costs.
        keep: the part in (0, 1) that every expert shall keep; that of the configuration unless given.
    """
    first, *others = config.rate_forms
    models = list(config.experts)
    forms = dict.fromkeys(models, first)
    keep = config.keep if keep is None else keep
    if keep is None or not any(measured[name].costs for name in names):
        return forms
    fewest = _bits(first, keep, names, measured)
    for form in others:
        for i, bits in enumerate(_bits(form, keep, names, measured)):
            if bits < fewest[i]:
                fewest[i], forms[models[i]] = bits, form
    return forms


def _bits(
    form: RateForm, keep: float, names: Sequence[str], measured: Mapping[str, Measured]
) -> list[float]:
    """Predict the bits that each expert needs in a form; infinity if the form cannot keep enough."""
    costs = tradeoffs(names, measured, form)
    allocation = Allocation(costs, laws=[LAWS[form]] * len(costs))
    slopes = allocation.slopes_to_keep([keep] * len(costs))
    figures = zip(allocation.bits(slopes), allocation.kept(slopes), strict=True)
    return [bits if kept >= keep else float("inf") for bits, kept in figures]


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
    by_form = {form: tradeoffs(names, measured, form) for form in set(forms.values())}
    costs = [by_form[form][i] for i, form in enumerate(forms.values())]
    return Allocation(costs, divergences, [LAWS[form] for form in forms.values()])


def tradeoffs(
    names: Sequence[str], measured: Mapping[str, Measured], form: RateForm
) -> list[Tensor]:
    """Sum the costs of the named weights in a form for each expert, in the order of the configuration.

    Each sum is `[4, n_slopes]` float64: bits, the squared error that remains, that of storing nothing, and the squared
    norm of the base; see `delta.tradeoff`.
    """
    by_weight = [[costs[form] for costs in measured[name].costs] for name in names]
    of_experts = zip(*filter(None, by_weight), strict=True)
    return [torch.stack(of_expert).sum(dim=0) for of_expert in of_experts]
