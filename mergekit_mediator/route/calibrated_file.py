"""The file of a calibrated router. It is checked against its experts and its model before it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.router_file import RouterFile, listed, number

KIND = "calibrated"
Kind = Literal["embedding", "hidden"]
Head = Literal["ridge", "mahalanobis", "prototype"]
TENSORS = (
    "tokens", "background", "center", "scale", "weight", "bias", "fit_weight", "fit_bias", "near_weight",
    "near_bias", "spread",
)  # fmt: skip
# The fit takes memory for the square of the number of prompts of all experts.
MOST_PROMPTS = 1 << 14
# The tokens of `hidden` follow every prompt; the tokens of `embedding` are those that all prompts share.
_MOST_TOKENS: dict[Kind, int] = {"hidden": 1 << 8, "embedding": 1 << 20}
_NUMBERS = (
    "temperature", "ood_threshold", "entropy_threshold", "variance", "fit_mean", "fit_deviation",
    "distance_mean", "distance_deviation",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """The sizes of a model, which bound the router's file.

    Attributes:
        hidden: the width of the hidden states; None if the configuration does not name it.
        embedding: the width of the input embedding.
        vocabulary: the number of rows of the input embedding.
        blocks: the number of decoder blocks.
    """

    hidden: int | None
    embedding: int
    vocabulary: int
    blocks: int

    @classmethod
    def of(cls, model: Any) -> "Limits":
        """Read the limits from a transformers model."""
        text = model.config.get_text_config()
        vocabulary, embedding = model.get_input_embeddings().weight.shape
        hidden = getattr(text, "hidden_size", None)
        return cls(hidden, embedding, vocabulary, getattr(text, "num_hidden_layers", 0))

    def check(self, kind: Kind, layers: tuple[int, ...], width: int, path: Path) -> None:
        """Refuse features that this model does not have.

        Args:
            kind: the features.
            layers: the decoder blocks of the features, from 1.
            width: the width d of the features.
            path: the router's file, for the message.

        Raises:
            ArtifactError: the width is another, or the model has no such layers.
        """
        states = None if self.hidden is None else 2 * self.hidden
        expected = self.embedding if kind == "embedding" else states
        if expected not in (None, width):
            raise ArtifactError(
                f"{path}: weight: {kind} features of width {expected} required, got {width}: was the "
                "router calibrated for another model?"
            )
        if not all(0 < layer <= self.blocks for layer in layers):
            raise ArtifactError(f"{path}: 'layers' must be from 1 to {self.blocks}, got {layers}")

    def check_tokens(self, tokens: Tensor, path: Path) -> None:
        """Refuse tokens that the model does not know.

        Raises:
            ArtifactError: a token is outside the vocabulary.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise ArtifactError(f"{path}: tokens must be from 0 to {self.vocabulary - 1}")


def read(
    path: Path, experts: Sequence[str] | None = None, limits: Limits | None = None
) -> dict[str, Any]:
    """Read the fields of a `CalibratedRouter` from a file that its `save` wrote.

    Args:
        path: the file.
        experts: the experts of the artifact, which must be the router's; None if they are not known.
        limits: the limits of the model; None if the model is not known.

    Raises:
        ArtifactError: the file is missing, damaged or inconsistent, holds a router of another kind, or belongs
            to other experts or another model.
    """
    file = RouterFile(path, KIND)
    about, names = file.about, file.experts(experts)
    if len(set(names)) < len(names) or len(names) < 2:
        raise ArtifactError(
            f"{path}: two or more different experts required, got {short(list(names))}"
        )
    kind: Kind = _one_of(about, "features", Kind, path)
    _check_tensors(file, names, kind, path)
    layers = _layers(about, kind, path)
    fields = {
        "kind": kind,
        "layers": layers,
        "head": _one_of(about, "head", Head, path),
        "seed": _whole(about.get("seed"), "seed", path),
        "numbers": _numbers(about, path),
    }
    if limits is not None:
        limits.check(kind, layers, file.header("weight")[1][1], path)
        limits.check_tokens(file.read("tokens"), path)
    fields["features"] = {name: file.read(f"features.{name}") for name in names}
    return fields | {name: file.read(name) for name in TENSORS}


def _check_tensors(file: RouterFile, experts: Sequence[str], kind: Kind, path: Path) -> None:
    """Check the header of every tensor, before any tensor is read.

    Raises:
        ArtifactError: a tensor is missing, not expected, or has another shape or dtype.
    """
    _, shape_of_weight = file.header("weight")
    if len(shape_of_weight) != 2:
        raise ArtifactError(f"{path}: `weight` must be a matrix, got shape {shape_of_weight}")
    n, d = len(experts), shape_of_weight[1]
    shapes: dict[str, tuple[int | None, ...]] = {
        **dict.fromkeys(("weight", "fit_weight", "near_weight"), (n, d)),
        **dict.fromkeys(("bias", "fit_bias", "near_bias"), (n,)),
        **dict.fromkeys(("center", "scale"), (d,)),
        **{f"features.{name}": (None, d) for name in experts},
        **dict.fromkeys(("spread", "background"), (None, d)),
        "tokens": (None,),
    }
    if set(shapes) != file.names:
        odd = listed(sorted(set(shapes) ^ file.names))
        raise ArtifactError(f"{path}: tensors missing or not expected: {odd}")
    for name, shape in shapes.items():
        dtype, got = file.header(name)
        expected = torch.int64 if name == "tokens" else torch.float32
        fits = len(shape) == len(got) and all(
            want in (None, size) for want, size in zip(shape, got, strict=True)
        )
        if not fits or dtype != expected:
            raise ArtifactError(
                f"{path}: {name} must be {[n or 'any' for n in shape]} of {expected}, "
                f"got {got} of {dtype}"
            )
    rows = {name: file.header(name)[1][0] for name in ("background", "spread", "tokens")}
    rows["features"] = sum(file.header(f"features.{name}")[1][0] for name in experts)
    most = {"features": MOST_PROMPTS, "background": MOST_PROMPTS, "spread": d}
    most["tokens"] = _MOST_TOKENS[kind]
    for name, count in rows.items():
        if count > most[name]:
            raise ArtifactError(f"{path}: {name}: at most {most[name]} rows required, got {count}")


def _layers(about: Mapping[str, Any], kind: Kind, path: Path) -> tuple[int, ...]:
    layers, count = about.get("layers"), 2 if kind == "hidden" else 0
    if not isinstance(layers, list) or len(layers) != count:
        raise ArtifactError(f"{path}: `layers` must be a list of {count}, got {short(layers)}")
    return tuple(_whole(layer, "layers", path) for layer in layers)


def _numbers(about: Mapping[str, Any], path: Path) -> dict[str, float]:
    numbers = about.get("numbers")
    if not isinstance(numbers, dict):
        raise ArtifactError(f"{path}: `numbers` must be an object, got {short(numbers)}")
    values = {key: number(numbers, key, path) for key in _NUMBERS}
    for key in ("temperature", "variance", "fit_deviation", "distance_deviation"):
        if values[key] <= 0:
            raise ArtifactError(f"{path}: {key!r} must be positive, got {values[key]}")
    return values


def _whole(value: Any, key: str, path: Path) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ArtifactError(f"{path}: {key!r} must be a whole number, got {short(value)}")
    return value


def check_known(experts: Sequence[str], artifact: Sequence[str], path: Path) -> None:
    """Refuse a router that chooses experts which the artifact does not have.

    Args:
        experts: the router's experts.
        artifact: the artifact's experts.
        path: the router's file, for the message.

    Raises:
        ArtifactError: there is such an expert.
    """
    unknown = [name for name in experts if name not in artifact]
    if unknown:
        raise ArtifactError(
            f"{path}: routes to {listed(unknown)}, and the manifest has {listed(artifact)}: calibrate again "
            "for these experts"
        )


def _one_of(about: Mapping[str, Any], key: str, choices: Any, path: Path) -> Any:
    if about.get(key) not in get_args(choices):
        names = ", ".join(get_args(choices))
        raise ArtifactError(f"{path}: {key!r} must be one of {names}, got {short(about.get(key))}")
    return about[key]
