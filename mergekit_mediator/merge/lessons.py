"""The prompts on which each expert of a merge is tuned, or the texts that it writes for it.

Prompts are read, checked and turned into token ids before any weight is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from mergekit_mediator.errors import ConfigError, PromptError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.models.loading import load_tokenizer, stock_config
from mergekit_mediator.models.prompt_files import MIN_PROMPTS, data_digest, read_prompts
from mergekit_mediator.models.prompts import Prompt, pad_token, render
from mergekit_mediator.tune.teacher import Answered, answer, room
from mergekit_mediator.tune.written import first_token, write

# The prompts of each expert that is tuned, or how many texts it writes.
Prompts = Mapping[ModelReference, Sequence[Prompt] | int]


@dataclass(frozen=True)
class Lesson:
    """The prompts or the texts on which one expert is tuned.

    Attributes:
        count: the number of prompts.
        answered: lets a model that holds the expert's weights answer them. It is called with a function that is
            called after each batch with its number of prompts.
        data: the digest of the prompts; None for texts that the expert writes.
    """

    count: int
    answered: Callable[[Any, Callable[[int], Any]], list[Answered]]
    data: str | None = None


Lessons = Mapping[ModelReference, Lesson]


def read_all_prompts(config: MediatorConfig) -> Prompts:
    """Read the prompts of every expert that is tuned.

    Raises:
        ConfigError: a file of prompts cannot be read, or an expert shall write too few texts.
    """
    return {model: read_prompts_of(model, given) for model, given in config.prompts.items()}


def prepare_lessons(prompts: Prompts, out: Path, trust_remote_code: bool = False) -> Lessons:
    """Turn prompts into token ids, and refuse experts that could not be tuned, before any weight is read.

    Args:
        prompts: the prompts of each expert that is tuned.
        out: a directory with the configuration and the tokenizer of the dense expert.
        trust_remote_code: let the model's own code run.

    Raises:
        ConfigError: there is no tokenizer, the model is no causal language model, or a prompt leaves no room
            for an answer.
    """
    if not prompts:
        return {}
    config = stock_config(out, trust_remote_code)
    if config is None:
        raise ConfigError(
            "prompts: tuning requires a causal language model that transformers knows, or whose own code may "
            "run: leave out the prompts, or give --trust-remote-code"
        )
    tokenizer: Any = load_tokenizer(out, trust_remote_code)
    if tokenizer is None:
        raise ConfigError(
            "prompts: a tokenizer required, but the base model has none: add one, or leave out the prompts"
        )
    lessons = {}
    for model, given in prompts.items():
        lessons[model] = _lesson(model, given, tokenizer, config)
    return lessons


def count_of(given: Sequence[Prompt] | int) -> int:
    """Count the prompts of an expert, or the texts that it writes."""
    return given if isinstance(given, int) else len(given)


def read_prompts_of(model: ModelReference, given: str | int) -> Sequence[Prompt] | int:
    """Read the prompts of one expert, or check the number of texts that it writes.

    Raises:
        ConfigError: the file cannot be read, holds too few prompts, or the number is too small.
    """
    if isinstance(given, int):
        if given < MIN_PROMPTS:
            raise ConfigError(
                f"model {model}: prompts: at least {MIN_PROMPTS} texts that the expert writes required, or a file "
                f"of prompts, got {given}: write 64"
            )
        return given
    try:
        return read_prompts(Path(given))
    except PromptError as error:
        raise ConfigError(f"model {model}: prompts: {error}") from error


def _lesson(
    expert: ModelReference, given: Sequence[Prompt] | int, tokenizer: Any, config: Any
) -> Lesson:
    try:
        if isinstance(given, int):
            first_token(tokenizer)
            return Lesson(given, lambda model, step: write(model, tokenizer, given, step))
        prompts = [render(tokenizer, prompt) for prompt in given]
        room(config, max(map(len, prompts)))
    except PromptError as error:
        raise ConfigError(f"model {expert}: prompts: {error}") from error
    return Lesson(
        len(prompts),
        lambda model, step: answer(model, prompts, pad_token(model), step),
        data_digest(given),
    )
