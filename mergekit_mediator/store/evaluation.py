"""The record of an artifact's last evaluation, from which its card and its report are written.

People may copy and edit the record, so no manifest vouches for it. It names the files that were evaluated: a record
of other files says nothing about the artifact.
"""

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store import durable
from mergekit_mediator.store.loaded_files import is_loaded
from mergekit_mediator.store.manifest import EVALUATION, Manifest

_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class TaskScore(_Model):
    """The score of a system on a task.

    Attributes:
        accuracy: the fraction of examples, 0 to 1, for which greedy decoding writes exactly the answer.
        answer_log_likelihood: the mean log-probability of an answer token, in nats.
        n: the number of examples.
    """

    accuracy: _Share
    answer_log_likelihood: float
    n: _Count


class SystemRecord(_Model):
    """One system.

    Attributes:
        normalized_mean: the mean over tasks of its accuracy, in percent of the task's expert; None if an expert
            answers nothing right.
        normalized_worst: the same of the worst task.
        total_bytes_over_base: the bytes of its weights and routers, as a multiple of the base's weights.
        routing_accuracy: the fraction of examples, 0 to 1, whose likeliest expert is that of their task.
        tasks: its score by task.
    """

    normalized_mean: float | None = None
    normalized_worst: float | None = None
    total_bytes_over_base: float | None = None
    routing_accuracy: _Share | None = None
    tasks: dict[str, TaskScore]


class TaskRouting(_Model):
    """The routing of a task's examples.

    Attributes:
        chosen: the number of examples by their likeliest expert.
        entropy: the mean entropy over the examples, in nats.
    """

    chosen: dict[str, _Count]
    entropy: float


class Evaluation(_Model):
    """The result of the command `evaluate`.

    Attributes:
        artifact: the digest of the files that were evaluated; see `loaded_digest`.
        sources: by task, its data: a file's name, `gym:TASK` or `lm_eval:TASK`.
        systems: by system, its scores and figures.
        routing: by task, the routing of its examples.
        reliability: for bins of confidence, the number of examples, their mean confidence and their accuracy.
    """

    artifact: str
    sources: dict[str, str]
    systems: dict[str, SystemRecord]
    routing: dict[str, TaskRouting]
    reliability: list[tuple[_Count, _Share, _Share]]

    @model_validator(mode="after")
    def _complete(self) -> "Evaluation":
        tasks, experts = set(self.sources), {frozenset(r.chosen) for r in self.routing.values()}
        for name, system in self.systems.items():
            if set(system.tasks) != tasks:
                raise ValueError(f"a score of system {name!r} on each task of `sources` required")
        if not tasks or not self.systems or set(self.routing) != tasks or len(experts) > 1:
            raise ValueError("a system, and the routing of each task of `sources`, required")
        return self


def loaded_digest(manifest: Manifest) -> str:
    """Compute the SHA-256 of the digests of all files that loading an artifact reads.

    Weights, experts, routers and the tokenizer count. The card and the configuration of the merge do not: a push
    changes them.
    """
    files = sorted(item for item in manifest.files.items() if is_loaded(item[0]))
    text = "\n".join(f"{file.sha256} {name}" for name, file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def write_evaluation(root: Path, evaluation: Evaluation) -> None:
    """Replace the record of the last evaluation.

    Raises:
        OSError: the file cannot be written.
    """
    durable.write_text(root / EVALUATION, evaluation.model_dump_json(indent=1) + "\n")


def read_evaluation(root: Path, manifest: Manifest) -> Evaluation | None:
    """Read the record of the last evaluation.

    Args:
        root: the artifact's directory.
        manifest: the artifact's manifest.

    Returns:
        None if there is none, or if other files were evaluated.

    Raises:
        ArtifactError: the record cannot be read.
    """
    path = root / EVALUATION
    if not path.is_file():
        return None
    try:
        evaluation = Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{path}: {place or 'content'}: {first['msg']}: run `mergekit-mediator evaluate` again, or "
            "remove the file"
        ) from error
    return evaluation if evaluation.artifact == loaded_digest(manifest) else None
