"""The results of an evaluation in a card's metadata, in the Hub's form `model-index`."""

import re
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import (
    EvalResult,
    eval_results_to_model_index,
    model_index_to_eval_results,
)

from mergekit_mediator.errors import OutputError, first_line
from mergekit_mediator.store.evaluation import Evaluation

# Results with this source are ours; all others in the metadata are other people's.
_SOURCE = "mergekit-mediator evaluate"
_ADDRESS = "https://github.com/mergekit-mediator/mergekit-mediator"
# The systems of the model index, with the name of their metric.
_SYSTEMS = {"mediator": "exact match, routed", "mediator_dense": "exact match, dense expert alone"}
_KEY = "model-index"
_BLOCK = re.compile(rf"^{_KEY}:.*\n(?:(?:[ \t-].*)?\n)*", re.MULTILINE)


def with_results(card: str, evaluation: Evaluation | None, name: str, where: str) -> str:
    """Put the results of an evaluation into a card's metadata, in place of those of an earlier one.

    The results of other people, and all other metadata, stay as they are.

    Args:
        card: the card.
        evaluation: the evaluation; None to remove the results of an earlier one.
        name: the name of the model, if the metadata has none.
        where: the card's place, for messages.

    Raises:
        OutputError: the card has no metadata, or the metadata cannot be read.
    """
    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        if evaluation is None:
            return card
        raise OutputError(f"{where}: metadata between two lines --- required at the top: add them")
    text = match[2] + "\n"
    try:
        metadata = yaml.safe_load(text) or {}
        present = metadata.get(_KEY) or []
        index = _merged(present, evaluation, name)
        if index:
            model_index_to_eval_results(index)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"{where}: the metadata cannot be read: {type(error).__name__}: {first_line(error)}: mend it"
        ) from error
    if index == present:
        return card
    wanted = {key: value for key, value in metadata.items() if key != _KEY}
    block = yaml.safe_dump({_KEY: index}, sort_keys=False, allow_unicode=True) if index else ""
    changed = _BLOCK.sub("", text) + block
    if index:
        wanted[_KEY] = index
    if not _means(changed, wanted):  # the block was written in another form, such as on one line
        changed = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return card[: match.start(2)] + changed.removesuffix("\n") + card[match.end(2) :]


def _merged(present: Any, evaluation: Evaluation | None, name: str) -> list[dict[str, Any]]:
    """Replace our results in a model index."""
    others = [
        {**model, "results": [r for r in model["results"] if not _is_ours(r)]} for model in present
    ]
    if evaluation is not None:
        (ours,) = eval_results_to_model_index(name, _results(evaluation))
        if not others:
            return [ours]
        others[0]["results"] += ours["results"]
    return [model for model in others if model["results"]]


def _is_ours(result: dict[str, Any]) -> bool:
    return (result.get("source") or {}).get("name") == _SOURCE


def _results(evaluation: Evaluation) -> list[EvalResult]:
    """The accuracy of each task, from 0 to 1, routed and of the dense expert alone."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=task,
            metric_type="exact_match",
            metric_name=metric,
            metric_value=round(evaluation.systems[system].tasks[task].accuracy, 4),
            source_name=_SOURCE,
            source_url=_ADDRESS,
        )
        for task, source in evaluation.sources.items()
        for system, metric in _SYSTEMS.items()
        if system in evaluation.systems
    ]


def _means(text: str, metadata: dict[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(text) == metadata)
    except yaml.YAMLError:
        return False
