"""Run a batch whose rows need different mixtures: in rows form, or one mixture after the other."""

import inspect
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.models.loading import consent
from mergekit_mediator.models.prompts import pad_token
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.serve.rows import Rows

Apply = Literal["auto", "merge", "rows"]
# `parted` runs the mixtures one after the other: `merge` becomes it where rows differ.
_Form = Literal["merge", "rows", "parted"]
# transformers generates so many tokens where nothing sets a limit.
_DEFAULT_STEPS = 20


class Serving:
    """Run the stock forward and generate of a model with a mixture for each row.

    Attributes:
        model: the transformers model.
        rows: applies one mixture per row.
    """

    def __init__(self, model: PreTrainedModel, stock: type[PreTrainedModel], mixer: Mixer) -> None:
        """Serve a model that holds the dense expert.

        Args:
            model: the transformers model.
            stock: the transformers class that has the stock forward and generate.
            mixer: the mixer of the same model.
        """
        self.model, self._mixer, self._stock = model, mixer, cast(Any, stock)
        self.rows = Rows(model, mixer)
        self._parameters = list(inspect.signature(stock.forward).parameters)[1:]

    def positional(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Name the positional arguments of the stock forward, from its third parameter on."""
        return dict(zip(self._parameters[2:], args, strict=False))

    def forward(self, **kwargs: Any) -> Any:
        """Run the stock forward; inside a mixture, mark the cache with its mixtures.

        Raises:
            MixtureError: the cache was computed with another mixture.
        """
        rows, cache = self._mixer.rows, caches.in_call(kwargs)
        if rows is None:
            return self._stock.forward(self.model, **kwargs)
        caches.check(cache, rows)
        output = self._stock.forward(self.model, **kwargs)
        caches.mark(caches.in_output(output), rows)
        return output

    def stock_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock generate.

        Raises:
            ArtifactError: `custom_generate` names code, and `trust_remote_code` is not set. The user is
                never asked.
        """
        custom = kwargs.get("custom_generate")
        if not isinstance(custom, str):
            return self._stock.generate(self.model, *args, **kwargs)
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        with consent(custom):
            return self._stock.generate(self.model, *args, **kwargs)

    def run(self, rows: tuple[Mixture, ...], apply: Apply, inputs: dict[str, Any]) -> Any:
        """Run one forward pass, each row of the batch with its mixture.

        Raises:
            MixtureError: the model is in training, `apply` is unknown, or the rows must run one mixture
                after the other and an argument does not allow it.
        """
        if torch.is_grad_enabled() and self.model.training:
            raise MixtureError("a routed model cannot be trained: train an expert and merge again")
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        form = self._form(rows, apply, caches.in_call(inputs), tokens.shape[1], 0)
        with torch.no_grad():
            if form == "parted":
                return self._run_parted(rows, inputs)
            with self._applied(rows, form):
                return self.forward(**inputs)

    def generate(self, rows: tuple[Mixture, ...], apply: Apply, inputs: dict[str, Any]) -> Any:
        """Run the stock generate, each row of the batch with its mixture.

        Raises:
            MixtureError: `apply` is unknown, or the rows must run one mixture after the other and an
                argument does not allow it.
        """
        length = inputs["inputs"].shape[1]
        steps = self._steps(length, inputs)
        form = self._form(rows, apply, caches.in_call(inputs), length, steps)
        if form != "parted":
            with self._applied(rows, form):
                return self.stock_generate(**inputs)
        if inputs.get("return_dict_in_generate"):
            raise MixtureError(
                "return_dict_in_generate: these rows need different mixtures and run one mixture "
                "after the other: generate one batch for each mixture, or use apply='rows'"
            )
        results: dict[int, Tensor] = {}
        for mixture, places in _groups(rows).items():
            with self._mixer.mixture(mixture):
                output = self.stock_generate(**_select(inputs, places, len(rows)))
            results.update(zip(places, output.unflatten(0, (len(places), -1)), strict=True))
        width = max(row.shape[-1] for row in results.values())
        pad = pad_token(self.model)
        return torch.cat(
            [
                torch.nn.functional.pad(
                    results[row], (0, width - results[row].shape[-1]), value=pad
                )
                for row in range(len(rows))
            ]
        )

    def _form(
        self, rows: tuple[Mixture, ...], apply: Apply, cache: Any, length: int, steps: int
    ) -> _Form:
        """Choose the form that a batch runs in; see `Settings.apply`.

        Raises:
            MixtureError: `apply` is unknown, or rows that must be parted come with a filled cache.
        """
        if apply not in get_args(Apply):
            raise MixtureError(f"apply must be one of {', '.join(get_args(Apply))}, got {apply!r}")
        if apply == "rows":
            return "rows"
        if len(set(rows)) == 1:
            cheaper = apply == "auto" and self.rows.is_cheaper(rows[0], len(rows), length, steps)
            return "rows" if cheaper else "merge"
        if apply == "auto" and self.rows.obstacle() is None:
            return "rows"
        if caches.is_filled(cache):
            raise MixtureError(
                "cache: these rows need different mixtures and would run one mixture after the "
                "other: leave the cache out, or give one batch for each mixture"
            )
        return "parted"

    def _steps(self, length: int, inputs: dict[str, Any]) -> int:
        """Count the tokens that generation may write for each row."""
        config = inputs.get("generation_config") or self.model.generation_config
        for name in ("max_new_tokens", "max_length"):
            limit = inputs.get(name) or getattr(config, name, None)
            if limit is not None:
                return int(limit) - (length if name == "max_length" else 0)
        return _DEFAULT_STEPS

    def _applied(self, rows: tuple[Mixture, ...], form: _Form) -> AbstractContextManager[object]:
        rows = caches.joined(rows)
        return self.rows.applied(rows) if form == "rows" else self._mixer.mixture(rows[0])

    def _run_parted(self, rows: tuple[Mixture, ...], inputs: dict[str, Any]) -> Any:
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name):
                raise MixtureError(
                    f"{name}: these rows need different mixtures and run one mixture after the "
                    "other: give one batch for each mixture"
                )
        labels = inputs.get("labels")
        rest = {k: v for k, v in inputs.items() if k not in ("labels", *caches.NAMES)}
        parts: dict[int, Tensor] = {}
        for mixture, places in _groups(rows).items():
            with self._mixer.mixture(mixture):
                output = self.forward(**_select({**rest, "use_cache": False}, places, len(rows)))
            parts.update(zip(places, output.logits, strict=True))
        output.logits = torch.stack([parts[row] for row in range(len(rows))])
        if labels is not None:
            output["loss"] = self.model.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.model.config.vocab_size
            )
        return output


def _groups(rows: tuple[Mixture, ...]) -> dict[Mixture, list[int]]:
    """Group the places of rows by the mixture that the rows need."""
    groups: dict[Mixture, list[int]] = {}
    for row, mixture in enumerate(rows):
        groups.setdefault(mixture, []).append(row)
    return groups


def _select(inputs: dict[str, Any], places: list[int], batch: int) -> dict[str, Any]:
    """Select the inputs of the rows at some places of a batch."""
    return {
        name: value[places]
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }
