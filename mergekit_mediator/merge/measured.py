"""The results of the passes over the weights of a merge, for one weight each."""

from dataclasses import dataclass

from torch import Tensor

from mergekit_mediator.merge.conflict import Conflict
from mergekit_mediator.merge.experts.costs import Costs


@dataclass(frozen=True)
class Measured:
    """The figures of one weight.

    Attributes:
        conflict: the conflict between the experts' task vectors; all zero for a buffer of integers.
        costs: for each expert the bits and the error at each slope, `[4, n_slopes]` float64, by form: of its task
            vector as low rank plus sparse, and of its difference from the dense expert as random signs; see
            `delta.tradeoff`. Empty for a buffer, and unless the caller asked for costs. Low rank plus sparse is missing
            where forms are not compared, see `experts.forms`.
    """

    conflict: Conflict
    costs: tuple[Costs, ...]


@dataclass(frozen=True)
class DenseVersions:
    """The dense expert's weight for each outcome of routing, on the CPU, in the output dtype.

    Both are one tensor if the outcome is known or makes no difference.

    Attributes:
        averaged: the weight of an averaged layer.
        routed: the weight of a routed layer.
    """

    averaged: Tensor
    routed: Tensor


@dataclass(frozen=True)
class Averaged:
    """One weight of the dense expert with its figures.

    Attributes:
        measured: the figures of the weight.
        directions: the leading directions of each expert, `[rank, in]` float16; empty unless the response
            router measures this weight.
        dense: the weight.
    """

    measured: Measured
    directions: tuple[Tensor, ...]
    dense: DenseVersions
