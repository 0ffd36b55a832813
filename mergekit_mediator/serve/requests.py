"""Answer a request: check its inputs, choose the mixture of each row, and run the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import MixtureError, RoutingError
from mergekit_mediator.models.contexts import Contexts, RouteOn, without_padding
from mergekit_mediator.models.prompts import pad_token
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.batch_forms import Apply, Serving
from mergekit_mediator.serve.batches import Batches, pad_left
from mergekit_mediator.serve.choice import Choice
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import Named


class Requests:
    """Answer the requests of one model, one at a time; see `MediatorModel` for their arguments."""

    def __init__(
        self, mixer: Mixer, batches: Batches, contexts: Contexts, choice: Choice, serving: Serving
    ) -> None:
        self._mixer, self._batches, self._contexts = mixer, batches, contexts
        self._choice, self._serving = choice, serving

    def generate(
        self,
        ids: Any,
        attention_mask: Tensor | None,
        mixture: Named | Sequence[Named | None] | None,
        route_on: RouteOn | None,
        apply: Apply,
        options: dict[str, Any],
    ) -> Any:
        """Generate with the mixture of each row; `options` are further arguments of the stock generate.

        Raises:
            MediatorError: see `MediatorModel.generate`.
        """
        if self._mixer.inside:
            _refuse_second(mixture)
            return self._serving.stock_generate(ids, attention_mask=attention_mask, **options)
        if options.get("cache_implementation") == "paged":
            raise MixtureError(
                "cache_implementation='paged' bypasses generate: name another implementation"
            )
        cache = caches.in_call(options)
        with self._mixer.lock:
            ids, mask = self._batches.tokens(ids, attention_mask)
            if not caches.is_filled(cache):
                ids, mask = pad_left(ids, mask)
            rows = self._choice.mixtures(ids, mask, mixture, cache, route_on)
            if options.get("streamer") is not None and len(ids) > 1:
                raise MixtureError(
                    f"streamer: a batch of one row is required, got {len(ids)} rows: leave the "
                    "streamer out, or give one row"
                )
            inputs = {"inputs": ids, "attention_mask": mask, **options}
            return self._serving.generate(rows, apply, inputs)

    def forward(
        self,
        inputs: dict[str, Any],
        mixture: Named | Sequence[Named | None] | None,
        route_on: RouteOn | None,
        apply: Apply,
    ) -> Any:
        """Run one forward pass with the mixture of each row; `inputs` are the stock forward's arguments.

        Raises:
            MediatorError: see `MediatorModel.forward`.
        """
        if self._mixer.inside:
            _refuse_second(mixture)
            return self._serving.forward(**inputs)
        cache, ids = caches.in_call(inputs), inputs["input_ids"]
        with self._mixer.lock:
            if caches.is_filled(cache) or ids is None:
                tokens = ids if ids is not None else inputs.get("inputs_embeds")
                if tokens is None:
                    raise RoutingError("input_ids or inputs_embeds are required, got neither")
                context = torch.ones(tokens.shape[:2], dtype=torch.long)
            else:
                context = self._context(ids, inputs["attention_mask"], inputs.get("labels"))
            rows = self._choice.mixtures(ids, context, mixture, cache, route_on)
            return self._serving.run(rows, apply, inputs)

    def _context(self, ids: Any, mask: Tensor | None, labels: Tensor | None) -> Tensor:
        """Mark the tokens to route by, `[batch, length]`; see `MediatorModel.forward`."""
        if not isinstance(ids, Tensor):
            raise RoutingError(
                f"input_ids: a tensor [batch, length] is required, got {type(ids).__name__}"
            )
        if mask is None:
            mask = without_padding(ids, {0, pad_token(self._serving.model)})
        ids, mask = self._batches.tokens(ids, mask)
        return self._contexts.before_answer(ids, mask, labels)


def _refuse_second(mixture: Any) -> None:
    """Refuse a request that names a mixture while one is in place."""
    if mixture is not None:
        raise MixtureError(
            f"mixture: one is in place already, got {mixture!r}: leave the argument out, or leave "
            "the mixture in place first"
        )
