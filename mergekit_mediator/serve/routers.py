"""Run the routers of an artifact by name: measure the model, then decide."""

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.models.contexts import Contexts
from mergekit_mediator.models.prompts import pad_token
from mergekit_mediator.route.calibrated import CalibratedRouter, Kind
from mergekit_mediator.route.calibrated_file import Limits, check_known
from mergekit_mediator.route.decision import (
    RoutingDecision,
    Thresholds,
    Unsure,
    decide_from_scores,
    for_experts,
)
from mergekit_mediator.route.features import hidden_features, mean_embedding
from mergekit_mediator.route.response import ResponseRouter
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import Mixture
from mergekit_mediator.store.manifest import RESPONSE, Manifest

Router = Literal["calibrated", "hidden", "embedding", "response", "likelihood"]
_CALIBRATED = ("calibrated", *get_args(Kind))


class Routers:
    """Route requests by `calibrated`, `response` or `likelihood`; the default is the first that exists.

    `hidden` and `embedding` name the calibrated router by the features that it was calibrated with.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        mixer: Mixer,
        contexts: Contexts,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Read no router yet.

        Args:
            root: the artifact's directory.
            manifest: the artifact's manifest; a router that it does not name is not read.
            model: the transformers model; it holds the dense expert outside mixtures.
            forward: the model's forward without routing.
            mixer: the mixer of the same model.
            contexts: chooses the tokens of a prompt that count.
            shapes: the shapes of the dense checkpoint's weights.
        """
        self._root, self._manifest = root, manifest
        self._model, self._forward = model, forward
        self._mixer, self._contexts, self._shapes = mixer, contexts, shapes
        self._stale: str | None = (manifest.router or {}).get("stale")
        if self._stale is not None:
            warnings.warn(f"{root}: the calibrated router is stale: {self._stale}", stacklevel=2)

    @property
    def default(self) -> Router:
        """The best router that this artifact has."""
        if self._calibrated is not None:
            return "calibrated"
        return "likelihood" if self._response is None else "response"

    def describe(self, router: Router | None) -> tuple[str, Thresholds]:
        """Return the name of a router (None is the default one) and its thresholds.

        Raises:
            ArtifactError: a router's file is damaged or does not fit the model.
        """
        return router or self.default, self.thresholds(router)

    def thresholds(self, router: Router | None) -> Thresholds:
        """Return the thresholds of a router; None is the default one."""
        unsure = unsure_of(self._manifest)
        if (router or self.default) not in _CALIBRATED or self._calibrated is None:
            return Thresholds(None, None, unsure)
        numbers = self._calibrated.numbers
        return Thresholds(numbers["entropy_threshold"], numbers["ood_threshold"], unsure)

    @torch.no_grad()
    def decide(
        self,
        ids: Tensor,
        mask: Tensor,
        counted: Tensor,
        router: Router | None = None,
        temperature: float | None = None,
    ) -> RoutingDecision:
        """Decide which experts each row needs; the dense expert must be in place.

        Args:
            ids: token ids `[batch, length]`.
            mask: attention mask `[batch, length]`.
            counted: `[batch, length]` bool, the tokens that tell requests apart.
            router: the router's name; None is the default one.
            temperature: the temperature of the softmax over experts, in the router's own unit.

        Raises:
            RoutingError: the router is unknown, or this artifact does not have it.
        """
        name = router or self.default
        if name not in get_args(Router):
            names = ", ".join(get_args(Router))
            raise RoutingError(f"unknown router {name!r}: choose one of {names}")
        options = {} if temperature is None else {"temperature": temperature}
        if name == "likelihood":
            return self._by_likelihood(ids, mask, counted, **options)
        if name in _CALIBRATED:
            return self._by_calibration(ids, mask, counted, name, temperature)
        responses, response = self._responses(ids, mask, counted)
        return response.decide(responses, self._reference, **options)

    @cached_property
    def _calibrated(self) -> CalibratedRouter | None:
        name = self._manifest.router_file
        if name is None:
            return None
        experts = tuple(self._mixer.experts.files)
        required = None if self._stale else experts
        router = CalibratedRouter.load(self._root / name, required, Limits.of(self._model))
        check_known(router.experts, experts, self._root / name)
        return router

    @cached_property
    def _response(self) -> ResponseRouter | None:
        """The router that needs no data, or None if it has nothing to measure in this model."""
        if RESPONSE not in self._manifest.files:
            return None
        path = self._root / RESPONSE
        router = ResponseRouter.load(path, tuple(self._mixer.experts.files), self._shapes)
        return router if router.applies_to(self._model) else None

    @cached_property
    def _reference(self) -> dict[str, Tensor]:
        """The responses to the chat template around an empty message."""
        tokens = self._contexts.nothing or [pad_token(self._model)]
        ids = torch.tensor([tokens], device=self._model.device)
        mask = torch.ones_like(ids)
        responses, _ = self._responses(ids, mask, self._contexts.counted(ids, mask))
        return responses

    def _by_calibration(
        self, ids: Tensor, mask: Tensor, counted: Tensor, name: Router, temperature: float | None
    ) -> RoutingDecision:
        router = self._calibrated
        if router is None:
            raise RoutingError(
                f"{self._root}: the artifact has no calibrated router: run `mergekit-mediator "
                "calibrate`"
            )
        if name not in ("calibrated", router.kind):
            raise RoutingError(
                f"{self._root}: the router is calibrated with {router.kind} features: run "
                f"`mergekit-mediator calibrate --features {name}` to route by {name}"
            )
        if router.kind == "embedding":
            embedding: Any = self._model.get_input_embeddings()
            features = mean_embedding(ids, counted, embedding.weight, router.tokens)
        else:
            features = hidden_features(
                self._model, ids, mask, counted, router.tokens, router.layers
            )
        decision = router.decide(features.cpu(), temperature)
        return for_experts(decision, tuple(self._mixer.experts.files))

    def _responses(
        self, ids: Tensor, mask: Tensor, counted: Tensor
    ) -> tuple[dict[str, Tensor], ResponseRouter]:
        if self._response is None:
            raise RoutingError(
                f"{self._root}: the response router has nothing to measure in this model: use the "
                "likelihood router, or run `mergekit-mediator calibrate`"
            )
        with self._response.recording(self._model, counted) as responses:
            self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return responses, self._response

    def _by_likelihood(
        self, ids: Tensor, mask: Tensor, counted: Tensor, temperature: float = 1.0
    ) -> RoutingDecision:
        """Decide by p(t | prompt) ∝ exp((L_t − L_dense) / T), with L in nats over the counted tokens."""
        dense = self._log_likelihood(ids, mask, counted)
        scores = []
        for name in self._mixer.experts.files:
            with self._mixer.mixture(Mixture(((name, 1.0),))):
                scores.append(self._log_likelihood(ids, mask, counted) - dense)
        names = tuple(self._mixer.experts.files)
        return decide_from_scores(torch.stack(scores, dim=1), names, temperature)

    def _log_likelihood(self, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
        """Sum the log-likelihoods of counted tokens that follow a token: nats, `[batch]` float32."""
        logits = self._forward(input_ids=ids, attention_mask=mask, use_cache=False).logits
        tokens = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        likelihood: Tensor = (tokens * (counted[:, 1:] * mask[:, :-1])).sum(dim=1)
        return likelihood


def unsure_of(manifest: Manifest) -> Unsure:
    """Tell what answers for an artifact where its router is not sure; see `Thresholds`."""
    return "blend" if manifest.merged_by is None else "dense"
