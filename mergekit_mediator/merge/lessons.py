"""The prompts of a merge's experts: read, checked and turned into token ids before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from mergekit_mediator.errors import ConfigError, PromptError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.models.loading import load_tokenizer, stock_config
from mergekit_mediator.models.prompt_files import data_digest, read_prompts
from mergekit_mediator.models.prompts import Prompt, render
from mergekit_mediator.tune.teacher import room

Prompts = Mapping[ModelReference, Sequence[Prompt]]


@dataclass(frozen=True)
class Lesson:
    """The prompts on which one expert is tuned.

    Attributes:
        prompts: the token ids of each prompt.
        data: the digest of the prompts.
    """

    prompts: Sequence[list[int]]
    data: str


Lessons = Mapping[ModelReference, Lesson]


def read_all_prompts(config: MediatorConfig) -> Prompts:
    """Read the prompts of every expert that is tuned.

    Raises:
        ConfigError: a file of prompts cannot be read.
    """
    return {model: read_prompts_of(model, path) for model, path in config.prompts.items()}


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
    for model, conversations in prompts.items():
        try:
            ids = [render(tokenizer, prompt) for prompt in conversations]
            room(config, max(map(len, ids)))
        except PromptError as error:
            raise ConfigError(f"model {model}: prompts: {error}") from error
        lessons[model] = Lesson(ids, data_digest(conversations))
    return lessons


def read_prompts_of(model: ModelReference, path: str) -> Sequence[Prompt]:
    """Read the prompts of one expert.

    Raises:
        ConfigError: the file cannot be read, or holds too few prompts.
    """
    try:
        return read_prompts(Path(path))
    except PromptError as error:
        raise ConfigError(f"model {model}: prompts: {error}") from error
