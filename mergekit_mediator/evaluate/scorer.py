"""Scores contenders on tasks, example by example, and remembers every answer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mergekit_mediator.errors import OutputError, TaskError
from mergekit_mediator.evaluate.contenders import Contender
from mergekit_mediator.evaluate.results import AnswerScore, Score
from mergekit_mediator.evaluate.tasks import Example, Task
from mergekit_mediator.models.answers import answer_logits
from mergekit_mediator.models.prefix import read_prefix
from mergekit_mediator.models.prompts import render

Tasks = Mapping[str, Task]


class Scorer:
    """Scores contenders; what was scored once, in this process or an earlier one, is not run again."""

    def __init__(
        self,
        tokenizer: Any,
        memory: Path | None = None,
        quiet: bool = False,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: of all contenders.
            memory: the file that answers are remembered in.
            quiet: show no progress.
            dtype: that contenders are loaded in; `auto` is the one they are stored in. With `float32`
                scores do not depend on which examples share a batch.
            trust_remote_code: let code run that comes with contenders.

        Raises:
            OutputError: the file is damaged.
        """
        self._tokenizer, self._memory, self._quiet = tokenizer, memory, quiet
        self._dtype, self._trust_remote_code = dtype, trust_remote_code
        self._known: dict[str, AnswerScore] = {}
        if memory is not None and memory.exists():
            try:
                kept = json.loads(memory.read_text(encoding="utf-8"))
                self._known = {key: AnswerScore(*values) for key, values in kept.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise OutputError(
                    f"{memory}: holds no scores: {error}: remove it to score everything anew"
                ) from error

    def alike(self, name: str, tasks: Tasks, contender: Contender) -> dict[str, Score]:
        """By task, with the same weights for every example."""
        everywhere = {task: [contender] * len(t.examples) for task, t in tasks.items()}
        return self.score(name, tasks, everywhere)

    def score(
        self, name: str, tasks: Tasks, answering: Mapping[str, Sequence[Contender]]
    ) -> dict[str, Score]:
        """By task, with weights of its own for every example.

        Args:
            name: of the system, for the progress bar.
            tasks: by name.
            answering: by task, who answers each of its examples.

        Raises:
            MediatorError: a contender that cannot be loaded, or a task that cannot be scored.
        """
        missing: dict[str, dict[str, list[Example]]] = {}
        contenders: dict[str, Contender] = {}
        for task, answerers in answering.items():
            for example, contender in zip(tasks[task].examples, answerers, strict=True):
                if self._key(contender, example) not in self._known:
                    contenders[contender.identity] = contender
                    by_task = missing.setdefault(contender.identity, {})
                    by_task.setdefault(task, []).append(example)
        count = sum(len(e) for by_task in missing.values() for e in by_task.values())
        with tqdm(total=count, desc=name, unit="prompt", disable=self._quiet or not count) as bar:
            for identity, by_task in missing.items():
                load = contenders[identity].load
                with load(self._dtype, self._trust_remote_code) as model:
                    for examples in by_task.values():
                        answers = score_answers(model, self._tokenizer, examples)
                        for example, answer in zip(examples, answers, strict=True):
                            self._known[self._key(contenders[identity], example)] = answer
                        bar.update(len(examples))
                self._save()
        return {
            task: Score.of(
                [
                    self._known[self._key(contender, example)]
                    for example, contender in zip(tasks[task].examples, answerers, strict=True)
                ]
            )
            for task, answerers in answering.items()
        }

    def _save(self) -> None:
        if self._memory is not None:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            kept = {key: astuple(answer) for key, answer in self._known.items()}
            written = self._memory.with_suffix(".partial")
            written.write_text(json.dumps(kept), encoding="utf-8")
            written.replace(self._memory)

    def _key(self, contender: Contender, example: Example) -> str:
        text = json.dumps([example.prompt, example.answer])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{contender.identity} {self._dtype} {digest}"


def score(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 8) -> Score:
    """Sum up `score_answers`.

    Raises:
        TaskError: no examples, or a tokenizer without an end of sequence.
    """
    return Score.of(score_answers(model, tokenizer, examples, batch_size))


def score_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 8
) -> list[AnswerScore]:
    """Score a causal language model on each example, with one forward pass and no decoding.

    The model reads prompt, answer and end of sequence, padded on the right. If at every answer
    position the most likely token is the answer's, then greedy decoding writes the answer, since
    it sees the same tokens; so the exact match of greedy decoding needs no decoding. What all
    prompts begin with, such as instructions, is read once where the model keeps an ordinary cache.

    model: any `AutoModelForCausalLM`, or what has its forward.

    Raises:
        TaskError: a tokenizer without an end of sequence.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise TaskError("the tokenizer has no end-of-sequence token, which ends an answer")
    pairs = []
    for example in examples:
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        pairs.append((render(tokenizer, example.prompt), [*answer, end]))
    # alike in length together: less padding, and answers in the same columns
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores: dict[int, AnswerScore] = {}
    with torch.inference_mode():
        prefix = read_prefix(model, [prompt for prompt, _ in pairs])
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found = answer_logits(model, [pairs[i] for i in rows], prefix)
            for i, logits in zip(rows, found, strict=True):
                target = torch.tensor(pairs[i][1], device=logits.device)
                chosen = logits.float().log_softmax(-1).gather(-1, target[:, None])
                scores[i] = AnswerScore(
                    right=bool((logits.argmax(-1) == target).all()),
                    log_likelihood=float(chosen.double().sum()),
                    tokens=len(target),
                )
    return [scores[i] for i in range(len(pairs))]
