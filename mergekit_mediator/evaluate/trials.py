"""The merges that are tried of a static method, made from the models of an artifact."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.evaluate.static_methods import AVERAGE, STATIC, StaticMethod
from mergekit_mediator.models.prompts import Prompt

Prompts = Mapping[str, Sequence[Prompt]]


@dataclass(frozen=True)
class Trial:
    """A merge with one choice of coefficients.

    Attributes:
        label: the method and its coefficients in a few words, such as `ties weight 1.0 density 0.2 times 1.5`.
        folder: the checkpoint.
        seconds: of the processor, that the merge took.
    """

    label: str
    folder: Path
    seconds: float


def average(made: Rivals) -> Trial:
    """Average all experts.

    Raises:
        InputError: mergekit refuses the merge.
    """
    (trial,) = trials(made, AVERAGE, STATIC[AVERAGE])
    return trial


def trials(
    made: Rivals, name: str, tried: StaticMethod, prompts: Prompts | None = None
) -> Iterator[Trial]:
    """Merge all experts by one method, with each choice of coefficients.

    Args:
        made: makes the merges.
        name: of the rival.
        tried: the method.
        prompts: of each expert's task, by the expert's name; required where the method needs them.

    Raises:
        InputError: mergekit refuses the merge.
    """
    files = _written(made.work, prompts or {}) if tried.needs_prompts else {}
    for parameters in tried.parameters:
        config = _configuration(made, tried.method, parameters, files)
        label = described(name, parameters)
        # a merge that saw other prompts is another merge
        place = "-".join([*label.split(), *{file.parent.name for file in files.values()}])
        if tried.factors == (1.0,):
            yield Trial(label, *made.merged(config, place))
            continue
        whole, seconds = made.merged({**config, "out_dtype": "float32"}, f"{place}-whole")
        for factor in tried.factors:
            folder, more = made.merged(_scaled(made, whole, factor), f"{place}-times-{factor}")
            yield Trial(f"{label} times {factor}", folder, seconds + more)


def described(method: str, parameters: Mapping[str, Any]) -> str:
    """Describe a merge in a few words, such as `ties weight 1.0 density 0.2`."""
    numbers = {k: v for k, v in parameters.items() if not isinstance(v, bool)}
    return " ".join([method, *(f"{name} {value}" for name, value in numbers.items())])


def _configuration(
    made: Rivals, method: str, parameters: Mapping[str, Any], prompts: Mapping[str, Path]
) -> dict[str, Any]:
    """Configure a merge of all experts."""
    models: list[dict[str, Any]] = [{"model": place} for place in made.experts.values()]
    if prompts:
        for entry, name in zip(models, made.experts, strict=True):
            entry["parameters"] = {"prompts": str(prompts[name])}
    config = {
        "merge_method": method,
        "models": models,
        "parameters": dict(parameters),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    return config if method == STATIC[AVERAGE].method else {**config, "base_model": made.base}


def _scaled(made: Rivals, whole: Path, factor: float) -> dict[str, Any]:
    """Configure the merge that multiplies the task vector of another one, which is in float32."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": made.base,
        "models": [{"model": str(whole)}],
        "parameters": {"weight": factor, "normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def _written(work: Path, prompts: Prompts) -> dict[str, Path]:
    """Write the prompts of each expert into a folder that is named by the digest of all prompts."""
    texts = {
        name: "\n".join(
            json.dumps({"prompt" if isinstance(prompt, str) else "messages": prompt})
            for prompt in of_expert
        )
        for name, of_expert in prompts.items()
    }
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:8]
    folder = work / "prompts" / digest
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in texts}
    for name, file in files.items():
        file.write_text(texts[name], encoding="utf-8")
    return files
