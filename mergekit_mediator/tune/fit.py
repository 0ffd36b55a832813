"""Brings what is stored of an expert nearer to the expert itself, on prompts, in as many bytes.

Knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531) of the expert into its own stored form,
as far as it is `tunable`: that is fitted to what the expert answers. The loss of an answer is
Σ_tokens KL(expert ‖ stored) in nats, with the tokens that the expert finds likely by themselves and all
others as one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.models.prefix import Prefix, read_prefix
from mergekit_mediator.tune.teacher import Answered, batches
from mergekit_mediator.tune.tunable import Tunable

# How often each prompt is seen. Found on prompts that are not reported.
_ROUNDS = 3
_WARM_UP = 5  # steps
# Whose activations are in memory at once; a single answer may be longer.
TOKENS_AT_ONCE = 512
# Every so many prompts one is not learnt from, and tells whether it helped.
_HELD_OUT = 8
_LEAST = 1e-6


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        stored: by weight, those that are stored otherwise now; empty if that was of no use.
        before, after: KL(expert ‖ stored) in nats for each answer, of prompts that were not learnt from.
    """

    stored: Mapping[str, StoredWeight]
    before: float
    after: float


def distil(
    model: Any,
    parts: Mapping[str, Tunable],
    answers: Sequence[Answered],
    step: Callable[[int], Any] = lambda _: None,
) -> Distilled:
    """Fit what is stored of an expert to its answers.

    Args:
        model: any `AutoModelForCausalLM` in float32, holding what is served as the expert.
        parts: by weight, what can be tuned of it; the model's weights follow.
        answers: of the expert, at least two.
        step: called with the number of answers in each batch that was learnt from.
    """
    held_out, learnt = answers[::_HELD_OUT], [a for i, a in enumerate(answers) if i % _HELD_OUT]
    before = _divergence(model, held_out)
    if parts:
        tuned = list(parts.values())
        with _gradients(model, tuned):
            _fit(model, tuned, learnt, step)
    after = _divergence(model, held_out)
    if after >= before:
        return Distilled({}, before, before)
    return Distilled({name: part.result() for name, part in parts.items()}, before, after)


def seen(answers: int) -> int:
    """How many answers `distil` learns from, each as often as it is seen."""
    return _ROUNDS * (answers - len(range(0, answers, _HELD_OUT)))


def _fit(
    model: Any,
    parts: Sequence[Tunable],
    answers: Sequence[Answered],
    step: Callable[[int], Any],
) -> None:
    """Adam (Kingma and Ba, arXiv 1412.6980) with a rate that rises at first and then falls to zero."""
    order = batches([len(a.prompt) + len(a.answer) for a in answers])
    moved: dict[float, list[nn.Parameter]] = {}
    for part in parts:
        for rate, parameter in part.parameters():
            moved.setdefault(rate, []).append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in moved.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-12)
    total = _ROUNDS * len(order)
    schedule = LambdaLR(
        optimizer, lambda done: min((done + 1) / _WARM_UP, 1 - (done + 1) / (total + 1))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ROUNDS):
        for place in torch.randperm(len(order), generator=generator).tolist():
            rows = [answers[i] for i in order[place]]
            _backward(model, rows)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            for part in parts:
                part.apply()
            step(len(rows))


def _backward(model: Any, answers: Sequence[Answered]) -> None:
    """The gradients of the mean loss of a batch."""
    prefix = read_prefix(model, [a.prompt for a in answers])
    for few in _parts(answers, prefix.length if prefix else 0):
        loss = torch.stack(list(_losses(model, few, prefix))).sum() / len(answers)
        torch.autograd.backward(loss)
    if prefix:
        prefix.backward()


def _parts(answers: Sequence[Answered], shared: int) -> list[Sequence[Answered]]:
    """A batch in parts whose activations are in memory together, with those of so many shared tokens."""
    longest = max(len(a.prompt) + len(a.answer) for a in answers) - shared
    count = max(1, (TOKENS_AT_ONCE - shared) // longest)
    return [answers[start : start + count] for start in range(0, len(answers), count)]


@contextmanager
def _gradients(model: nn.Module, parts: Sequence[Tunable]) -> Iterator[None]:
    """Every gradient of a weight goes to its parts at once, so that only one is in memory."""
    hooks = []

    def collect(owned: Sequence[Tunable], parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.contiguous()
            for part in owned:
                offset = part.weight.storage_offset() - parameter.storage_offset()
                place = part.weight.shape, part.weight.stride(), offset
                part.add_gradient(gradient.as_strided(*place))
            parameter.grad = None

    storages: dict[int, list[Tunable]] = {}
    for part in parts:
        storages.setdefault(part.weight.untyped_storage().data_ptr(), []).append(part)
    for parameter in model.parameters():
        owned = storages.get(parameter.untyped_storage().data_ptr(), [])
        parameter.requires_grad_(bool(owned))
        if owned:
            register: Any = parameter.register_post_accumulate_grad_hook
            hooks.append(register(partial(collect, owned)))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)


def _losses(
    model: Any, answers: Sequence[Answered], prefix: Prefix | None = None
) -> Iterator[Tensor]:
    """KL(expert ‖ model) of each answer in nats, summed over its tokens."""
    logits = answer_logits(model, [(a.prompt, a.answer) for a in answers], prefix)
    for answered, found in zip(answers, logits, strict=True):
        logs = found.float().log_softmax(-1).gather(-1, answered.likely)
        p = answered.logs.exp()
        others = (1 - p.sum(-1)).clamp(min=_LEAST)
        of_others = (1 - logs.exp().sum(-1)).clamp(min=_LEAST)
        likely = (p * (answered.logs - logs)).sum()
        yield likely + (others * (others.log() - of_others.log())).sum()


def _divergence(model: Any, answers: Sequence[Answered]) -> float:
    """The mean of their losses."""
    total = 0.0
    with torch.no_grad():
        prefix = read_prefix(model, [a.prompt for a in answers])
        for rows in batches([len(a.prompt) + len(a.answer) for a in answers]):
            losses = _losses(model, [answers[i] for i in rows], prefix)
            total += sum(float(loss) for loss in losses)
    return total / len(answers)
