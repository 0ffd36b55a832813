"""The distance of an adapter's answers from those of the expert that it was made of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.adapter import Adapter
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.peft_shira import SparseAdapter
from mergekit_mediator.models.answers import Pair, answer_logits
from mergekit_mediator.models.loading import load_plain, load_tokenizer
from mergekit_mediator.models.locate import locate_weights
from mergekit_mediator.models.prompts import Prompt, pad_token, render

_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class AnswerError:
    """The figures of an adapter's answers.

    Attributes:
        divergence: the mean KL divergence KL(expert ‖ adapter) of a token of the expert's answers, in nats.
        same: the part of these tokens in [0, 1] that the adapter would have chosen, too.
    """

    divergence: float
    same: float


class AnswerProbe:
    """The dense expert with prompts, on which an expert and its adapter answer in turn."""

    def __init__(self, experts: StoredExperts, prompts: Sequence[Prompt]) -> None:
        """Load the dense expert in float32.

        Args:
            experts: the artifact's experts, relative to its dense expert.
            prompts: the prompts.

        Raises:
            ExportError: the experts are relative to the base.
        """
        if experts.reference != "dense":
            raise ExportError(
                "prompts are answered by the dense expert and adapters of it: relative to dense required"
            )
        self._experts = experts
        self._model = load_plain(experts.root, "float32")
        tokenizer = load_tokenizer(experts.root)
        self._prompts = [render(tokenizer, prompt) for prompt in prompts]
        self._places = locate_weights(self._model, experts.weights, experts.dense.shapes)
        self._last: dict[str, tuple[list[Pair], Tensor]] = {}

    @torch.no_grad()
    def error(self, name: str, adapter: Adapter | SparseAdapter) -> AnswerError:
        """Let the expert answer greedily, at most 16 tokens, and the adapter predict the same tokens.

        Args:
            name: the expert.
            adapter: the expert's adapter, relative to the dense expert.

        Raises:
            ExportError: the expert is unknown.
        """
        pairs, expected = self._answered(name)
        with self._in_place(self._adapted(adapter)):
            got = self._log_probabilities(pairs)
        same = (expected.argmax(dim=-1) == got.argmax(dim=-1)).double().mean()
        return AnswerError(_divergence(expected, got), float(same))

    @torch.no_grad()
    def kept(self, name: str, adapter: Adapter) -> float:
        """Measure the part of an expert's gain over the dense expert that an adapter's matrices keep.

        It is 1 − KL(expert ‖ adapter) / KL(expert ‖ dense), where the weights that the adapter cannot hold are the
        expert's: no rank brings them back.

        Args:
            name: the expert.
            adapter: the expert's adapter, relative to the dense expert.

        Returns:
            The part, at most 1.

        Raises:
            ExportError: the expert is unknown.
        """
        pairs, expected = self._answered(name)
        gain = _divergence(expected, self._log_probabilities(pairs))
        with self._in_place({**self._adapted(adapter), **self._expert(name, adapter.dropped)}):
            lost = _divergence(expected, self._log_probabilities(pairs))
        return 1 - lost / gain if gain else 1.0

    def _answered(self, name: str) -> tuple[list[Pair], Tensor]:
        """Let an expert answer the prompts; its answers and its predictions of them, kept for the last expert."""
        if name not in self._last:
            with self._in_place(self._expert(name)):
                pairs = [(prompt, self._answer(prompt)) for prompt in self._prompts]
                self._last = {name: (pairs, self._log_probabilities(pairs))}
        return self._last[name]

    def _answer(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        answered = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=pad_token(self._model),
        )
        answer: list[int] = answered[0, len(prompt) :].tolist()
        return answer

    def _log_probabilities(self, pairs: Sequence[Pair]) -> Tensor:
        """Predict the tokens of all answers, `[tokens, vocabulary]` float64."""
        logits = [rows for pair in pairs for rows in answer_logits(self._model, [pair])]
        return torch.cat(logits).double().log_softmax(dim=-1)

    def _expert(self, name: str, among: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the weights of an expert that differ from the dense expert's, of all weights or among some."""
        weights = {}
        for change in self._experts.changes({name: 1.0}, among):
            weight = self._experts.dense.weight(change.weight).clone()
            mix_(weight, change.parts)
            weights[change.weight] = weight
        return weights

    def _adapted(self, adapter: Adapter | SparseAdapter) -> dict[str, Tensor]:
        """Return the weights of the dense expert that an adapter changes; a tied head is its embedding."""
        return {
            name: self._places[name] + change
            for name, change in adapter.changes()
            if name in self._places
        }

    @contextmanager
    def _in_place(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the model weights by name, and take them back at the end."""
        before = {name: self._places[name].clone() for name in weights}
        try:
            for name, weight in weights.items():
                self._places[name].copy_(weight)
            yield
        finally:
            for name, weight in before.items():
                self._places[name].copy_(weight)


def _divergence(expected: Tensor, got: Tensor) -> float:
    """Compute the mean KL divergence in nats of log-probabilities `[tokens, vocabulary]`."""
    return max(0.0, float((expected.exp() * (expected - got)).sum(dim=-1).mean()))
