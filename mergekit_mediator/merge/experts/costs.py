"""The bits and the error at which an expert's version of one weight is stored, at each slope and by form."""

from collections.abc import Container, Mapping

from mergekit.common import ModelReference
from torch import Tensor

from mergekit_mediator.delta.random_sign_costs import random_sign_tradeoff
from mergekit_mediator.delta.tradeoff import tradeoff
from mergekit_mediator.delta.value_forms import RateForm
from mergekit_mediator.merge.conflict import task_vectors
from mergekit_mediator.merge.experts.spectra import Spectra
from mergekit_mediator.merge.loaders import OpenInputs
from mergekit_mediator.merge.planner import PlannedWeight

Costs = Mapping[RateForm, Tensor]


class CostMeter:
    """Measures the costs of weights in the forms that the configuration allows.

    Attributes:
        measures_signs: whether experts may become random signs.
    """

    def __init__(
        self,
        inputs: OpenInputs,
        spectra: Spectra | None = None,
        compared: Container[str] | None = None,
    ) -> None:
        """Prepare to measure.

        Args:
            inputs: the models, entered.
            spectra: keeps the decompositions, if a later pass encodes them.
            compared: the names of the weights that are measured in every form; None for all. Where there is a choice, the
                others are measured as random signs alone.
        """
        self._inputs, self._spectra, self._compared = inputs, spectra, compared
        self._device = inputs.options.device or "cpu"
        self.measures_signs = "random_sign" in inputs.config.rate_forms

    def decomposes(self, name: str) -> bool:
        """Whether a weight is measured as low rank plus sparse."""
        compared = self._compared is None or name in self._compared
        return compared and "low_rank" in self._inputs.config.rate_forms

    def low_rank(
        self, weight: PlannedWeight, model: ModelReference, change: Tensor, base_square: float
    ) -> Tensor:
        """Measure low rank plus sparse; the decomposition is kept if it is used again.

        Args:
            weight: the weight.
            model: the expert.
            change: what is stored of the weight, float32.
            base_square: the squared norm of the base's weight.

        Returns:
            `[4, n_slopes]` float64, see `delta.tradeoff`.
        """
        components = None
        if self._spectra is not None:
            expert = self._inputs.config.experts[model]
            components = self._spectra.decompose(expert, weight.info.name, change)
        return tradeoff(change, components, base_square)

    def random_sign(
        self, weight: PlannedWeight, model: ModelReference, dense: Tensor, base_square: float
    ) -> Tensor:
        """Measure random signs, which store the difference from the dense expert; the expert is read for it.

        Args:
            weight: the weight.
            model: the expert.
            dense: the dense expert's weight.
            base_square: the squared norm of the base's weight.

        Returns:
            `[4, n_slopes]` float64, see `delta.random_sign_costs`.

        Raises:
            InputError: see `OpenInputs.load`.
        """
        expert = self._inputs.load(weight, model, dense)
        (difference,) = task_vectors(dense, [expert], self._device)
        return random_sign_tradeoff(difference, base_square)
