"""Fits the stored form of an expert to the expert's answers to prompts; its number of bytes stays.

The method is knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) of the expert into its own
stored form, of which `tunable` moves a part. The loss of an answer is Σ_tokens KL(expert ‖ stored) in nats. Each
token that the expert finds likely counts alone; all other tokens count as one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.models.prefix import Prefix, read_prefix
from mergekit_mediator.tune.gradients import gradients
from mergekit_mediator.tune.teacher import Answered, batches
from mergekit_mediator.tune.tunable import Tunable

# Passes over the prompts. Tuned on prompts that no table reports; no results file holds that search.
ROUNDS = 3
_WARM_UP = 5  # steps
# Tokens whose activations are in memory at once; a single answer may be longer.
TOKENS_AT_ONCE = 512
# The first of every so many answers is held out, and shows whether the fit helps.
HELD_OUT = 8
_LEAST = 1e-6  # the least probability of the other tokens, whose logarithm must be finite


@dataclass(frozen=True)
class Distilled:
    """The result of a fit.

    Attributes:
        stored: the new stored forms, by the name of the weight; empty if the fit did not help.
        before: KL(expert ‖ stored) in nats per answer before the fit, the mean of the held-out answers.
        after: the same after the fit.
    """

    stored: Mapping[str, StoredWeight]
    before: float
    after: float


def distil(
    model: Any,
    parts: Mapping[str, Tunable],
    answers: Sequence[Answered],
    step: Callable[[int], Any] = lambda _: None,
    rounds: int = ROUNDS,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Distilled:
    """Fit the stored form of an expert to the expert's answers.

    Args:
        model: any `AutoModelForCausalLM` in float32, which holds the stored form of the expert.
        parts: the tunable parts of the stored form, by the name of the weight. The model's weights follow.
        answers: of the expert, at least two.
        step: called after each batch with its number of answers.
        rounds: passes over the answers.
        tokens_at_once: tokens whose activations are in memory at once.
    """
    held_out = answers[::HELD_OUT]
    training = [a for i, a in enumerate(answers) if i % HELD_OUT]
    before = divergence(model, held_out)
    if parts:
        tunables = list(parts.values())
        with gradients(model, tunables):
            _fit(model, tunables, training, step, rounds, tokens_at_once)
    after = divergence(model, held_out)
    if after >= before:
        return Distilled({}, before, before)
    return Distilled({name: part.result() for name, part in parts.items()}, before, after)


def seen(answers: int, rounds: int = ROUNDS) -> int:
    """Count the answers of all batches of `distil`, given the number of answers."""
    return rounds * (answers - len(range(0, answers, HELD_OUT)))


def _fit(
    model: Any,
    parts: Sequence[Tunable],
    answers: Sequence[Answered],
    step: Callable[[int], Any],
    rounds: int,
    tokens_at_once: int,
) -> None:
    """Run Adam (Kingma and Ba, arXiv 1412.6980) with a rate that rises at first and then falls to zero."""
    order = batches([len(a.prompt) + len(a.answer) for a in answers])
    by_rate: dict[float, list[nn.Parameter]] = {}
    for part in parts:
        for rate, parameter in part.parameters():
            by_rate.setdefault(rate, []).append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-12)
    total = rounds * len(order)
    schedule = LambdaLR(
        optimizer, lambda done: min((done + 1) / _WARM_UP, 1 - (done + 1) / (total + 1))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        for place in torch.randperm(len(order), generator=generator).tolist():
            rows = [answers[i] for i in order[place]]
            _backward(model, rows, tokens_at_once)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            for part in parts:
                part.apply()
            step(len(rows))


def _backward(
    model: Any, answers: Sequence[Answered], tokens_at_once: int = TOKENS_AT_ONCE
) -> None:
    """Add the gradients of the mean loss of a batch."""
    prefix = read_prefix(model, [a.prompt for a in answers])
    for few in _parts(answers, prefix.length if prefix else 0, tokens_at_once):
        loss = torch.stack(list(divergences(model, few, prefix))).sum() / len(answers)
        torch.autograd.backward(loss)
    if prefix:
        prefix.backward()


def _parts(
    answers: Sequence[Answered], shared: int, tokens_at_once: int
) -> list[Sequence[Answered]]:
    """The parts of a batch whose activations are in memory at once, with those of a shared prefix of tokens."""
    longest = max(len(a.prompt) + len(a.answer) for a in answers) - shared
    count = max(1, (tokens_at_once - shared) // longest)
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def divergences(
    model: Any, answers: Sequence[Answered], prefix: Prefix | None = None
) -> Iterator[Tensor]:
    """Compute KL(expert ‖ model) of each answer in nats, summed over its tokens.

    Args:
        model: any `AutoModelForCausalLM`.
        answers: of the expert, with the probabilities of their likeliest tokens.
        prefix: see `answer_logits`.
    """
    pairs = [(a.prompt, a.answer) for a in answers]
    for answered, logits in zip(answers, answer_logits(model, pairs, prefix), strict=True):
        logs = logits.float().log_softmax(-1).gather(-1, answered.likely)
        p = answered.logs.exp()
        # The probability of all other tokens, of the expert and of the model.
        p_others = (1 - p.sum(-1)).clamp(min=_LEAST)
        q_others = (1 - logs.exp().sum(-1)).clamp(min=_LEAST)
        likely = (p * (answered.logs - logs)).sum()
        yield likely + (p_others * (p_others.log() - q_others.log())).sum()


def divergence(model: Any, answers: Sequence[Answered]) -> float:
    """Compute KL(expert ‖ model) in nats per answer, the mean of answers.

    Args:
        model: any `AutoModelForCausalLM`.
        answers: of the expert, at least one.
    """
    total = 0.0
    with torch.no_grad():
        prefix = read_prefix(model, [a.prompt for a in answers])
        for rows in batches([len(a.prompt) + len(a.answer) for a in answers]):
            losses = divergences(model, [answers[i] for i in rows], prefix)
            total += sum(float(loss) for loss in losses)
    return total / len(answers)
