"""The pass of RegMean++: it merges one decoder block after the other, and reads the prompts through them."""

from collections.abc import Iterator, Mapping

from mergekit.common import ModelReference
from torch import Tensor, nn

from mergekit_mediator.merge.prompted.models import PromptedModels
from mergekit_mediator.merge.prompted.stored_figures import FiguresOfWeights
from mergekit_mediator.methods.regmean_pp import RegressionMean
from mergekit_mediator.models.blocks import (
    Call,
    decoder_blocks,
    input_products,
    read_text,
    run_block,
    weights_of,
)


def regression_means(models: PromptedModels) -> FiguresOfWeights:
    """Merge the experts block by block.

    Args:
        models: of the merge. The model in memory is the merged one at the end.

    Returns:
        The merged task vectors.

    Raises:
        ArtifactError: the model has no decoder blocks that this package finds.
    """
    texts = {}
    for expert in models.experts:
        texts[expert] = [a.prompt + a.answer for a in models.answers(expert)]
    run = _Run(models)
    blocks = decoder_blocks(models.model)
    inside = [weights_of(block, models.places) for block in blocks]
    for name in set(models.places).difference(*inside):
        run.merge(name, {})
    run.read(texts)
    with models.bar("merge blocks", len(blocks)) as bar:
        for number, (block, names) in enumerate(zip(blocks, inside, strict=True)):
            run.merge_block(number, block, names)
            bar.update()
    return run.merged


class _Run:
    """The merged weights so far, and the texts as far as the merged blocks have read them."""

    def __init__(self, models: PromptedModels) -> None:
        self._models, self.merged = models, FiguresOfWeights()
        self._hidden: dict[ModelReference, list[Tensor]] = {}
        self._calls: dict[ModelReference, list[list[Call]]] = {}
        self._off_diagonal = {
            name: float(models.parameter(name, "off_diagonal")) for name in models.places
        }

    def read(self, texts: Mapping[ModelReference, list[list[int]]]) -> None:
        """Read all texts with the merged embeddings."""
        for expert, of_expert in texts.items():
            pairs = [read_text(self._models.model, tokens) for tokens in of_expert]
            self._hidden[expert] = [hidden for hidden, _ in pairs]
            self._calls[expert] = [calls for _, calls in pairs]

    def merge_block(self, number: int, block: nn.Module, names: list[str]) -> None:
        """Merge one block on its inputs in each expert, and read the texts through the merged block."""
        models = self._models
        matrices = {
            name: module
            for module in block.modules()
            if isinstance(module, nn.Linear)
            for name in weights_of(module, models.places)
            if models.places[name].ndim == 2
        }
        means = {name: RegressionMean(self._off_diagonal[name]) for name in matrices}
        for expert in models.experts:
            for name in names:
                models.places[name].copy_(models.load(name, expert))
            with input_products(matrices) as products:
                self._through(block, number, expert)
            for name, product in products.items():
                means[name].add(self._task_vector(name, expert), product)
            unread = means.keys() - products.keys()
            matrices = {name: module for name, module in matrices.items() if name not in unread}
            means = {name: means[name] for name in matrices}
        for name in names:
            self.merge(name, means)
        for expert in models.experts:
            self._hidden[expert] = self._through(block, number, expert)

    def merge(self, name: str, means: Mapping[str, RegressionMean]) -> None:
        """Merge one weight: by regression, or by the mean of the task vectors. The model gets the merged weight."""
        models = self._models
        tau = means[name].merged() if name in means else self._mean(name)
        self.merged.put(name, tau)
        place = models.places[name]
        place.copy_(models.load(name, models.base))
        place.add_(tau, alpha=float(models.parameter(name, "lambda")))

    def _through(self, block: nn.Module, number: int, expert: ModelReference) -> list[Tensor]:
        calls = self._calls[expert]
        rows = zip(self._hidden[expert], calls, strict=True)
        return [run_block(block, hidden, of_text[number]) for hidden, of_text in rows]

    def _task_vector(self, name: str, expert: ModelReference) -> Tensor:
        """One expert's task vector, times its `weight`, float32."""
        models = self._models
        place, weight = models.places[name], models.parameter(name, "weight")[expert]
        tau = models.load(name, expert).to(place, copy=True)
        return tau.sub_(models.load(name, models.base).to(place)).mul_(weight)

    def _mean(self, name: str) -> Tensor:
        taus: Iterator[Tensor] = (self._task_vector(name, e) for e in self._models.experts)
        total = next(taus)
        for tau in taus:
            total += tau
        return total / len(self._models.experts)
