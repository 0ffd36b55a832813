"""Score contenders on tasks, example by example, and remember every answer's score."""

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
    """Score contenders; an answer that this process or an earlier one has scored is not scored again."""

    def __init__(
        self,
        tokenizer: Any,
        memory: Path | None = None,
        quiet: bool = False,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Read the scores of earlier processes.

        Args:
            tokenizer: the tokenizer of all contenders.
            memory: the file of remembered scores; None remembers them in this process alone.
            quiet: show no progress.
            dtype: the dtype of loaded contenders; `auto` is the stored dtype. With `float32` the score of
                an example does not depend on the examples that share its batch.
            trust_remote_code: let the contenders' own code run.

        Raises:
            OutputError: the file is damaged.
        """
        self._tokenizer, self._memory, self._quiet = tokenizer, memory, quiet
        self._dtype, self._trust_remote_code = dtype, trust_remote_code
        self._scores: dict[str, AnswerScore] = {}
        if memory is not None and memory.exists():
            try:
                content = json.loads(memory.read_text(encoding="utf-8"))
                self._scores = {key: AnswerScore(*values) for key, values in content.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise OutputError(
                    f"{memory}: the file holds no scores: {error}: remove it to score everything anew"
                ) from error

    def alike(self, name: str, tasks: Tasks, contender: Contender) -> dict[str, Score]:
        """Score one contender on all examples; return its score by task.

        Raises:
            MediatorError: see `score`.
        """
        everywhere = {task: [contender] * len(t.examples) for task, t in tasks.items()}
        return self.score(name, tasks, everywhere)

    def score(
        self, name: str, tasks: Tasks, answering: Mapping[str, Sequence[Contender]]
    ) -> dict[str, Score]:
        """Score a system that may answer each example with another contender; return its score by task.

        Args:
            name: the system's name, for the progress bar.
            tasks: the tasks by name.
            answering: for each task, the contender that answers each example.

        Raises:
            MediatorError: a contender cannot be loaded, or a task cannot be scored.
        """
        missing: dict[str, dict[str, list[Example]]] = {}
        contenders: dict[str, Contender] = {}
        for task, answerers in answering.items():
            for example, contender in zip(tasks[task].examples, answerers, strict=True):
                if self._key(contender, example) not in self._scores:
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
                            self._scores[self._key(contenders[identity], example)] = answer
                        bar.update(len(examples))
                self._save()
        return {
            task: Score.of(
                [
                    self._scores[self._key(contender, example)]
                    for example, contender in zip(tasks[task].examples, answerers, strict=True)
                ]
            )
            for task, answerers in answering.items()
        }

    def _save(self) -> None:
        if self._memory is not None:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            content = {key: astuple(answer) for key, answer in self._scores.items()}
            partial = self._memory.with_suffix(".partial")
            partial.write_text(json.dumps(content), encoding="utf-8")
            partial.replace(self._memory)

    def _key(self, contender: Contender, example: Example) -> str:
        text = json.dumps([example.prompt, example.answer])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{contender.identity} {self._dtype} {digest}"


def score(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 8) -> Score:
    """Score a causal language model on examples; see `score_answers`.

    Raises:
        TaskError: there is no example, or the tokenizer has no end of sequence.
    """
    return Score.of(score_answers(model, tokenizer, examples, batch_size))


def score_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 8
) -> list[AnswerScore]:
    """Score a causal language model on each example, with one forward pass and no decoding.

    The model reads prompt, answer and end of sequence, padded on the right. If the answer's token is the most
    likely one at every position of the answer, greedy decoding writes the answer, since it sees the same
    tokens. So the exact match of greedy decoding needs no decoding. A prefix that all prompts share, such as
    instructions, is read once if the model has an ordinary cache.

    Args:
        model: an `AutoModelForCausalLM`, or an object with its forward.
        tokenizer: the model's tokenizer.
        examples: the examples.
        batch_size: the number of examples in a forward pass.

    Returns:
        The scores, in the order of the examples.

    Raises:
        TaskError: the tokenizer has no end of sequence.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise TaskError(
            "the tokenizer has no end-of-sequence token, and every answer must end with one: set "
            "eos_token in the tokenizer"
        )
    pairs = []
    for example in examples:
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        pairs.append((render(tokenizer, example.prompt), [*answer, end]))
    # Batches of similar lengths need little padding and have their answers in the same columns.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores: dict[int, AnswerScore] = {}
    with torch.inference_mode():
        prefix = read_prefix(model, [prompt for prompt, _ in pairs])
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = answer_logits(model, [pairs[i] for i in rows], prefix)
            for i, logits in zip(rows, batch, strict=True):
                target = torch.tensor(pairs[i][1], device=logits.device)
                log_likelihoods = logits.float().log_softmax(-1).gather(-1, target[:, None])
                scores[i] = AnswerScore(
                    right=bool((logits.argmax(-1) == target).all()),
                    log_likelihood=float(log_likelihoods.double().sum()),
                    tokens=len(target),
                )
    return [scores[i] for i in range(len(pairs))]
