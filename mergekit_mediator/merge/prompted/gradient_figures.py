"""The figures that are made of gradients of answers: Fisher information, and the votes of RCP."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_mediator.merge.prompted.models import PromptedModels
from mergekit_mediator.merge.prompted.stored_figures import FiguresOfExperts, FiguresOfWeights
from mergekit_mediator.methods.rcp import votes
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.tune.gradients import Receiver, gradients
from mergekit_mediator.tune.teacher import Answered


def fisher_information(models: PromptedModels) -> FiguresOfExperts:
    """Measure the Fisher information of each expert, divided by its root mean square over the model."""
    figures = FiguresOfExperts(len(models.experts))
    for index, expert in enumerate(models.experts):
        answers = models.answers(expert)
        squares = {name: _Squares(place) for name, place in models.places.items()}
        _backward(models, f"Fisher of {expert}", squares, answers, by_token=False)
        count = sum(square.total.numel() for square in squares.values())
        norm = sum(float(square.total.double().square().sum()) for square in squares.values())
        scale = (count / norm) ** 0.5 if norm else 0.0
        for name, square in squares.items():
            figures.put(index, name, square.total * scale)
    return figures


def rcp_votes(models: PromptedModels) -> FiguresOfExperts:
    """Let the prompts of each domain model vote on the changes that do not harm the reasoning model."""
    figures = FiguresOfExperts(len(models.experts))
    first = next(iter(models.places))
    penalty = float(models.parameter(first, "penalty"))
    reasoning = next(m for m, reasons in models.parameter(first, "reasoning").items() if reasons)
    information = FiguresOfWeights()
    answers = models.answers(reasoning)
    squares = {name: _Squares(place, place) for name, place in models.places.items()}
    _backward(models, f"Fisher of {reasoning}", squares, answers)
    for name, square in squares.items():
        information.put(name, square.total / len(answers))
    del squares
    for index, expert in enumerate(models.experts):
        if expert == reasoning:
            for name, place in models.places.items():
                figures.put(index, name, torch.ones_like(place, dtype=torch.bool))
            continue
        answers = models.answers(expert)
        ballots = {}
        for name, place in models.places.items():
            apart = models.load(name, reasoning).to(place) - place
            harm = penalty * information.of(name).to(place) * apart.square()
            ballots[name] = _Votes(place, harm)
        _backward(models, f"votes of {expert}", ballots, answers)
        for name, ballot in ballots.items():
            figures.put(index, name, ballot.total > 0)
    return figures


class _Squares:
    """The sum of the squared gradients of one weight, or of their products with the weight itself."""

    def __init__(self, weight: Tensor, factor: Tensor | None = None) -> None:
        self.weight, self._factor = weight, factor
        self.total = torch.zeros_like(weight)

    def add_gradient(self, gradient: Tensor) -> None:
        product = gradient if self._factor is None else gradient * self._factor
        self.total.addcmul_(product, product)


class _Votes:
    """The votes on each parameter of one weight."""

    def __init__(self, weight: Tensor, harm: Tensor) -> None:
        self.weight, self._harm = weight, harm
        self.total = torch.zeros_like(weight)

    def add_gradient(self, gradient: Tensor) -> None:
        self.total.add_(votes(gradient, self.weight, self._harm))


def _backward(
    models: PromptedModels,
    description: str,
    receivers: Mapping[str, Receiver],
    answers: Sequence[Answered],
    by_token: bool = True,
) -> None:
    """Compute the gradients of the negative log-likelihood of each answer, one by one.

    Args:
        models: of which one, whose answers these are, is in memory.
        description: for the progress bar.
        receivers: of gradients, by the name of the weight.
        answers: of the model.
        by_token: divide the loss by the number of the answer's tokens.
    """
    with (
        gradients(models.model, list(receivers.values())),
        models.bar(description, len(answers)) as bar,
    ):
        for answered in answers:
            (logits,) = answer_logits(models.model, [(answered.prompt, answered.answer)])
            target = torch.tensor(answered.answer, device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")
            torch.autograd.backward(loss / len(target) if by_token else loss)
            bar.update()
