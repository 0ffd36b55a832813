"""Runs a batch whose rows need different mixtures: in rows form, or the rows of each mixture together."""

import inspect
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

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
# The rows of each mixture one after the other, besides: what `merge` is for rows that differ.
_Form = Literal["merge", "rows", "parted"]
# transformers' own default.
_DEFAULT_STEPS = 20


class Serving:
    """The model's own forward and generate, with given mixtures."""

    def __init__(self, model: PreTrainedModel, stock: type[PreTrainedModel], mixer: Mixer) -> None:
        """
        Args:
            model: holding the dense expert.
            stock: the class whose forward and generate are the model's own.
            mixer: of the same model.
        """
        self._model, self._mixer, self._rows = model, mixer, Rows(model, mixer)
        self._stock: Any = stock
        self._parameters = list(inspect.signature(stock.forward).parameters)[1:]

    def positional(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Arguments of the model's own forward that came without a name, after the first two."""
        return dict(zip(self._parameters[2:], args, strict=False))

    def forward(self, **kwargs: Any) -> Any:
        """The model's own forward inside a mixture; caches know afterwards what filled them.

        Raises:
            MixtureError: the cache was computed with another mixture.
        """
        rows, cache = self._mixer.rows, caches.given(kwargs)
        if rows is None:
            return self._stock.forward(self._model, **kwargs)
        caches.check(cache, rows)
        output = self._stock.forward(self._model, **kwargs)
        caches.mark(caches.made(output), rows)
        return output

    def own_generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate.

        Raises:
            ArtifactError: `custom_generate` names code that may not run: nobody is asked.
        """
        custom = kwargs.get("custom_generate")
        if not isinstance(custom, str):
            return self._stock.generate(self._model, *args, **kwargs)
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        with consent(custom):
            return self._stock.generate(self._model, *args, **kwargs)

    def run(self, rows: tuple[Mixture, ...], apply: Apply, inputs: dict[str, Any]) -> Any:
        """One forward pass, each row of the batch with its mixture."""
        if torch.is_grad_enabled() and self._model.training:
            raise MixtureError("a routed model cannot be trained: train an expert and merge again")
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        form = self._form(rows, apply, caches.given(inputs), given.shape[1], 0)
        with torch.no_grad():
            if form == "parted":
                return self._run_parted(rows, inputs)
            with self._applied(rows, form):
                return self.forward(**inputs)

    def generate(self, rows: tuple[Mixture, ...], apply: Apply, inputs: dict[str, Any]) -> Any:
        """The model's own generate, each row of the batch with its mixture."""
        length = inputs["inputs"].shape[1]
        steps = self._steps(length, inputs)
        form = self._form(rows, apply, caches.given(inputs), length, steps)
        if form != "parted":
            with self._applied(rows, form):
                return self.own_generate(**inputs)
        if inputs.get("return_dict_in_generate"):
            raise MixtureError(
                "return_dict_in_generate: these rows need different mixtures and run one mixture "
                "after the other: generate them one batch for each, or use apply='rows'"
            )
        results: dict[int, Tensor] = {}
        for mixture, places in _groups(rows).items():
            with self._mixer.mixture(mixture):
                output = self.own_generate(**_select(inputs, places, len(rows)))
            results.update(zip(places, output.unflatten(0, (len(places), -1)), strict=True))
        width = max(row.shape[-1] for row in results.values())
        pad = pad_token(self._model)
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
        """How a batch is run; see `MediatorModel.apply`.

        Raises:
            MixtureError: an unknown `apply`, or a cache for rows that would have to be parted.
        """
        if apply not in get_args(Apply):
            raise MixtureError(f"apply must be one of {', '.join(get_args(Apply))}, got {apply!r}")
        if apply == "rows":
            return "rows"
        if len(set(rows)) == 1:
            own = apply == "auto" and self._rows.is_cheaper(rows[0], len(rows), length, steps)
            return "rows" if own else "merge"
        if apply == "auto" and self._rows.obstacle() is None:
            return "rows"
        if caches.is_filled(cache):
            raise MixtureError(
                "cache: these rows need different mixtures and would run one after the "
                "other: leave the cache out, or give one batch for each mixture"
            )
        return "parted"

    def _steps(self, length: int, inputs: dict[str, Any]) -> int:
        """How many tokens generation may write for each row."""
        config = inputs.get("generation_config") or self._model.generation_config
        for name in ("max_new_tokens", "max_length"):
            limit = inputs.get(name) or getattr(config, name, None)
            if limit is not None:
                return int(limit) - (length if name == "max_length" else 0)
        return _DEFAULT_STEPS

    def _applied(self, rows: tuple[Mixture, ...], form: _Form) -> AbstractContextManager[object]:
        rows = caches.joined(rows)
        return self._rows.applied(rows) if form == "rows" else self._mixer.mixture(rows[0])

    def _run_parted(self, rows: tuple[Mixture, ...], inputs: dict[str, Any]) -> Any:
        refused = [k for k in ("output_hidden_states", "output_attentions") if inputs.get(k)]
        if refused:
            raise MixtureError(
                f"{refused[0]}: these rows need different mixtures and run one after the other: "
                "give one batch for each mixture"
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
            output["loss"] = self._model.loss_function(
                logits=output.logits, labels=labels, vocab_size=self._model.config.vocab_size
            )
        return output


def _groups(rows: tuple[Mixture, ...]) -> dict[Mixture, list[int]]:
    """Rows by the mixture they need."""
    groups: dict[Mixture, list[int]] = {}
    for row, mixture in enumerate(rows):
        groups.setdefault(mixture, []).append(row)
    return groups


def _select(inputs: dict[str, Any], places: list[int], batch: int) -> dict[str, Any]:
    """The inputs of some rows."""
    return {
        name: value[places]
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }
