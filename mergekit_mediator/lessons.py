"""What experts are tuned on: prompts as the model gets them, refused at once where they are no use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from mergekit_mediator.calibration_data import data_digest, read_prompts
from mergekit_mediator.config import MediatorConfig
from mergekit_mediator.errors import ConfigError, PromptError, RoutingError
from mergekit_mediator.loading import load_tokenizer, stock_config
from mergekit_mediator.prompts import Prompt, render
from mergekit_mediator.teacher import room

Prompts = Mapping[ModelReference, Sequence[Prompt]]


@dataclass(frozen=True)
class Lesson:
    """What one expert is tuned on.

    Attributes:
        prompts: token ids of each.
        data: their digest.
    """

    prompts: Sequence[list[int]]
    data: str


Lessons = Mapping[ModelReference, Lesson]


def read_all_prompts(config: MediatorConfig) -> Prompts:
    """The prompts of every expert that has any.

    Raises:
        ConfigError: they cannot be read.
    """
    return {model: _read(model, path) for model, path in config.prompts.items()}


def prepare_lessons(prompts: Prompts, out: Path, trust_remote_code: bool = False) -> Lessons:
    """The prompts as the model will get them; refuses at once what could not be tuned in the end.

    Args:
        prompts: by expert.
        out: a directory with the configuration and the tokenizer of the dense expert.
        trust_remote_code: let code run that comes with them.

    Raises:
        ConfigError: there is no tokenizer, no model can be made, or a prompt has no answer.
    """
    if not prompts:
        return {}
    config = stock_config(out, trust_remote_code)
    if config is None:
        raise ConfigError(
            "prompts: tuning on them requires a causal language model that transformers knows, or whose own "
            "code may run: leave them out, or give --trust-remote-code"
        )
    tokenizer: Any = load_tokenizer(out, trust_remote_code)
    if tokenizer is None:
        raise ConfigError(
            "prompts: the base model has no tokenizer to read them with: add one, or leave them out"
        )
    lessons = {}
    for model, asked in prompts.items():
        try:
            ids = [render(tokenizer, prompt) for prompt in asked]
            room(config, max(map(len, ids)))
        except PromptError as error:
            raise ConfigError(f"model {model}: prompts: {error}") from error
        lessons[model] = Lesson(ids, data_digest(asked))
    return lessons


def _read(model: ModelReference, path: str) -> Sequence[Prompt]:
    try:
        return read_prompts(Path(path))
    except RoutingError as error:
        raise ConfigError(f"model {model}: prompts: {error}") from error
