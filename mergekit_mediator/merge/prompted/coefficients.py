"""The training of Expert Merging: one coefficient for each layer and expert.

With an expert's own answer y to a prompt, the loss is KL(expert ‖ merged) / |y| + hidden · ‖h − h_t‖² / ‖h_t‖², with
h the states after the middle block, and penalty · mean (c − 1/T)² for T experts. These weights, Adam with a rate that
falls to 0, and the start at the mean are this project's own choices.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor, nn

from mergekit_mediator.merge.prompted.models import PromptedModels
from mergekit_mediator.merge.prompted.stored_figures import FiguresOfWeights
from mergekit_mediator.models.blocks import decoder_blocks, weights_of
from mergekit_mediator.tune.fit import divergences
from mergekit_mediator.tune.gradients import gradients
from mergekit_mediator.tune.teacher import Answered


def aligned_coefficients(models: PromptedModels) -> FiguresOfWeights:
    """Train the coefficients; they stay at the mean if training did not lower the loss.

    Args:
        models: of the merge.

    Returns:
        The coefficients of each weight, `[experts]` float32.

    Raises:
        ArtifactError: the model has no decoder blocks that this package finds.
    """
    settings = {
        name: models.parameter(next(iter(models.places)), name)
        for name in ("steps", "rate", "hidden", "penalty")
    }
    middle = decoder_blocks(models.model)[len(decoder_blocks(models.model)) // 2]
    lessons = [_lessons(models, middle, expert) for expert in models.experts]
    merged = _Merged(models)
    start = merged.coefficients.detach().clone()
    before = _mean_loss(models, middle, lessons, merged, settings)
    optimizer = torch.optim.Adam([merged.coefficients], lr=float(settings["rate"]))
    steps = int(settings["steps"])
    with (
        gradients(models.model, list(merged.receivers.values())),
        models.bar("align coefficients", steps) as bar,
    ):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = settings["rate"] * (1 - step / steps)
            optimizer.zero_grad()
            batch = [of_expert[step % len(of_expert)] for of_expert in lessons]
            torch.autograd.backward(_loss(models.model, middle, batch, settings["hidden"]).mean())
            apart = (merged.coefficients - 1 / len(lessons)).square().mean()
            torch.autograd.backward(settings["penalty"] * apart)
            optimizer.step()
            merged.apply()
            bar.update()
    if _mean_loss(models, middle, lessons, merged, settings) >= before:
        merged.coefficients.data.copy_(start)
    figures = FiguresOfWeights()
    for name, layer in merged.layers.items():
        figures.put(name, merged.coefficients.detach()[layer])
    return figures


@dataclass(frozen=True)
class _Lesson:
    """One answer of an expert, with its hidden states after the middle block, `[tokens, width]`."""

    answered: Answered
    hidden: Tensor


class _Merged:
    """The merged model in memory, which follows its coefficients `[layers, experts]`.

    Attributes:
        layers: the row of the coefficients by the name of the weight.
        receivers: of gradients, by the name of the weight.
    """

    def __init__(self, models: PromptedModels) -> None:
        self._models = models
        inside = [weights_of(block, models.places) for block in decoder_blocks(models.model)]
        others = [[name] for name in models.places if not any(name in names for names in inside)]
        groups = [*inside, *others]
        self.layers = {name: row for row, names in enumerate(groups) for name in names}
        count = len(models.experts)
        self.coefficients = nn.Parameter(torch.full((len(groups), count), 1 / count))
        self.receivers = {name: _Projection(self, name) for name in models.places}
        self.apply()

    def apply(self) -> None:
        """Put base + Σ_t c_lt τ_t into the model."""
        for name, place in self._models.places.items():
            place.copy_(self._models.load(name, self._models.base))
            row = self.coefficients.detach()[self.layers[name]].tolist()
            taus = list(self.task_vectors(name))
            for coefficient, tau in zip(row, taus, strict=True):
                place.add_(tau, alpha=coefficient)

    def task_vectors(self, name: str) -> Iterator[Tensor]:
        """The task vectors of one weight, float32, each times the `weight` of its expert."""
        models = self._models
        place = models.places[name]
        base = models.load(name, models.base).to(place, copy=True)
        weights = models.parameter(name, "weight")
        for expert in models.experts:
            yield (models.load(name, expert).to(place) - base) * weights[expert]

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add to the gradients of the coefficients: ⟨gradient, τ_t⟩."""
        products = [float((gradient * tau).sum()) for tau in self.task_vectors(name)]
        if self.coefficients.grad is None:
            self.coefficients.grad = torch.zeros_like(self.coefficients)
        self.coefficients.grad[self.layers[name]] += torch.tensor(products)


class _Projection:
    """The receiver of the gradients of one weight."""

    def __init__(self, merged: _Merged, name: str) -> None:
        self._merged, self._name = merged, name
        self.weight = merged._models.places[name]

    def add_gradient(self, gradient: Tensor) -> None:
        self._merged.add_gradient(self._name, gradient)


def _lessons(models: PromptedModels, middle: nn.Module, expert: ModelReference) -> list[_Lesson]:
    """Let one expert answer its prompts, and note its hidden states."""
    lessons = []
    for answered in models.answers(expert):
        with torch.no_grad(), _states(middle) as states:
            tokens = torch.tensor([answered.prompt + answered.answer], device=models.model.device)
            models.model(tokens, use_cache=False)
        lessons.append(_Lesson(answered, states[0][0]))
    return lessons


@contextmanager
def _states(middle: nn.Module) -> Iterator[list[Tensor]]:
    """Note the outputs `[batch, tokens, width]` of a block inside the context."""
    states: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = middle.register_forward_hook(note)
    try:
        yield states
    finally:
        handle.remove()


def _loss(model: Any, middle: nn.Module, batch: Sequence[_Lesson], hidden: float) -> Tensor:
    """The losses of the answers of a batch, `[batch]`."""
    with _states(middle) as states:
        apart = list(divergences(model, [lesson.answered for lesson in batch]))
    losses = []
    for divergence, row, lesson in zip(apart, states[0], batch, strict=True):
        own = lesson.hidden
        distance = (row[: len(own)] - own).square().sum() / own.square().sum()
        losses.append(divergence / len(lesson.answered.answer) + hidden * distance)
    return torch.stack(losses)


@torch.no_grad()
def _mean_loss(
    models: PromptedModels,
    middle: nn.Module,
    lessons: Sequence[Sequence[_Lesson]],
    merged: _Merged,
    settings: Mapping[str, Any],
) -> float:
    """The mean loss of all answers, with the penalty."""
    losses = [
        float(_loss(models.model, middle, [lesson], settings["hidden"]))
        for of_expert in lessons
        for lesson in of_expert
    ]
    apart = (merged.coefficients - 1 / len(lessons)).square().mean()
    return sum(losses) / len(losses) + float(settings["penalty"] * apart)
