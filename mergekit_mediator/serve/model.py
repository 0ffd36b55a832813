"""MediatorModel: loads an artifact, and answers each request with the mixture of experts that it needs."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_mediator.errors import MixtureError, RoutingError
from mergekit_mediator.models.contexts import Contexts, RouteOn, without_padding
from mergekit_mediator.models.loading import (
    DenseCheckpoint,
    load_config,
    load_model,
    load_tokenizer,
    local_directory,
)
from mergekit_mediator.models.prompts import pad_token
from mergekit_mediator.remote_code import is_ours
from mergekit_mediator.route.decision import RoutingDecision
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.batch_forms import Apply, Serving
from mergekit_mediator.serve.batches import Batches, pad_left
from mergekit_mediator.serve.choice import Choice
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import Mixture, Named
from mergekit_mediator.serve.residency import Experts, Residency
from mergekit_mediator.serve.routed_class import route_calls
from mergekit_mediator.serve.routers import Router, Routers
from mergekit_mediator.serve.settings import SettingAttribute, Settings, unknown_setting
from mergekit_mediator.store.expert_file import open_expert
from mergekit_mediator.store.manifest import RESPONSE, Manifest, read_manifest, verify_files

_QUANTISING = ("quantization_config", "load_in_8bit", "load_in_4bit")
# What a model is besides its settings.
_ATTRIBUTES = frozenset({"root", "manifest", "model", "tokenizer", "settings"})


class MediatorModel:
    """A dense expert, its sparse experts, and a router.

    Threads may share it: one request runs at a time, with its own mixture, and the others wait. How
    requests are answered is set by `settings`, of which every one is an attribute of the model too:
    `model.policy = "soft"`.

    Attributes:
        model: the transformers model, routed: `model.model(...)` and `model.model.generate(...)` are
            `forward` and `generate` below; inside `mixture` they are the model's own.
        tokenizer: of the artifact, or None if it has none.
        manifest: of the artifact.
        settings: how requests are answered; see `settings.Settings`.
    """

    policy = SettingAttribute()
    entropy_threshold = SettingAttribute()
    ood_threshold = SettingAttribute()
    ood_action = SettingAttribute()
    fallback = SettingAttribute()
    route_on = SettingAttribute()
    apply = SettingAttribute()

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        model: PreTrainedModel,
        tokenizer: Any,
        residency: Residency = "device",
        expert_budget: int | None = None,
    ) -> None:
        """Use `from_pretrained`."""
        self.settings = Settings()
        self.root, self.manifest, self.model, self.tokenizer = root, manifest, model, tokenizer
        dense = DenseCheckpoint(root)
        files = {e.name: open_expert(root, e, dense.shapes) for e in manifest.experts}
        experts = Experts(files, dense.weight, residency, expert_budget)
        self._mixer = Mixer(model, experts, [layer.weights for layer in manifest.routed_layers])
        self._contexts = Contexts(tokenizer)
        self._batches = Batches(root, model, tokenizer)
        self._serving = Serving(model, route_calls(model, self), self._mixer)
        self._routers = Routers(
            root, manifest, model, self._serving.forward, self._mixer, self._contexts, dense.shapes
        )
        self._choice = Choice(self.settings, self._mixer, self._routers, self._contexts)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        verify: bool = True,
        trust_remote_code: bool = False,
        residency: Residency = "device",
        expert_budget: int | None = None,
        **kwargs: Any,
    ) -> "MediatorModel":
        """Load an artifact from a directory or from the Hub.

        Args:
            source: a directory, or a repository's name on the Hub.
            revision: of the repository.
            verify: check the digest of every file first, at the speed of reading it.
            trust_remote_code: let code run that comes with the artifact, which is that of its base model:
                of its tokenizer, its configuration and its model. Nobody is asked.
            residency: where decoded experts stay: `device`, `cpu` or `disk`; see `residency.Experts`.
            expert_budget: bytes that decoded experts may take, all together.
            kwargs: as for `AutoModelForCausalLM.from_pretrained`; `dtype` is the stored one
                unless given.

        Raises:
            ArtifactError: there is no artifact, a file of it is missing or altered, or it needs code that
                may not run.
            MixtureError: the model was loaded in a form that experts cannot be put into.
        """
        quantised = [name for name in _QUANTISING if kwargs.get(name)]
        if quantised:
            raise MixtureError(
                f"{quantised[0]}: experts are put into floating-point weights: leave it out, and "
                "load the model in bfloat16"
            )
        root = local_directory(source, revision)
        manifest = read_manifest(root)
        if verify:
            verify_files(root, manifest)
        kwargs.setdefault("dtype", "auto")
        config = kwargs.pop("config", None)
        if not isinstance(config, PretrainedConfig):
            config = load_config(config or root, trust_remote_code)
        model = load_model(root, config, trust_remote_code, **kwargs)
        _forget_remote_code(model.config)
        tokenizer = load_tokenizer(root, trust_remote_code)
        return cls(root, manifest, model, tokenizer, residency, expert_budget)

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        source: str | Path,
        *,
        revision: str | None = None,
        verify: bool = True,
        trust_remote_code: bool = False,
    ) -> "MediatorModel":
        """Route a model that was loaded from an artifact as its stock class.

        Args:
            model: holding the artifact's dense expert.
            source: the artifact's directory, or a repository's name on the Hub.
            revision: of the repository; that of the model unless given, where transformers knows it.
            verify: check the digest of every file first, once, at the speed of reading it.
            trust_remote_code: let code run that comes with the artifact's tokenizer. Nobody is asked.

        Raises:
            ArtifactError: there is no artifact, a file of it is missing or altered, or its tokenizer needs
                code that may not run.
            MixtureError: the model was loaded in a form that experts cannot be put into.
        """
        root = local_directory(source, revision or getattr(model.config, "_commit_hash", None))
        manifest = read_manifest(root)
        if verify:
            verify_files(root, manifest)
        return cls(root, manifest, model, load_tokenizer(root, trust_remote_code))

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name.startswith("_") or name in _ATTRIBUTES or name in Settings.model_fields):
            raise unknown_setting(name)
        super().__setattr__(name, value)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the order of the columns of a routing decision."""
        return self.manifest.expert_names

    @property
    def resident_bytes(self) -> int:
        """What decoded experts take in memory now."""
        return self._mixer.resident_bytes

    def mixture(self, weights: Named) -> AbstractContextManager[PreTrainedModel]:
        """Put W_dense + Σ_t p_t Δ_t in place; enters with the model, and restores the dense expert after.

        Inside, the model is as its stock class: nothing is routed. Other threads wait.

        Args:
            weights: by expert, at least 0, or an expert's name; none is the dense expert.

        Raises:
            MixtureError: see `mixture.Mixer.mixture`.
        """
        mixture: Any = self._mixer.mixture(self._choice.named(weights))
        return cast(AbstractContextManager[PreTrainedModel], mixture)

    def mixture_digest(self, mixture: Named | Sequence[Named]) -> str:
        """A key for caches of what is computed with a mixture, or with one for each row of a batch:
        32 hexadecimal digits that differ between artifacts and between mixtures."""
        rows = [mixture] if isinstance(mixture, str | Mapping | Mixture) else mixture
        return caches.digest(self._identity, tuple(self._choice.named(row) for row in rows))

    def route(
        self,
        prompts: str | Sequence[str] | Tensor | Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        router: Router | None = None,
        temperature: float | None = None,
        route_on: RouteOn | None = None,
    ) -> RoutingDecision:
        """Which experts each prompt needs, decided once on the whole prompt.

        Args:
            prompts: texts, put through the chat template if there is one; or token ids
                `[batch, length]`; or a tokenizer's output.
            attention_mask: `[batch, length]`, 0 for padding, with token ids.
            router: `calibrated`; `response`, from one pass of the dense expert; or `likelihood`, from
                the prompt's likelihood under each expert. The first that the artifact has is the
                default.
            temperature: of the softmax over experts, in the router's own unit.
            route_on: instead of the attribute.

        Returns:
            weights `[batch, n_experts]`, entropy `[batch]` in nats, ood `[batch]`, experts.

        Raises:
            RoutingError: an empty prompt or batch, or a prompt longer than the model's context.
            MixtureError: a mixture is in place.
        """
        ids, mask = self._batches.tokens(prompts, attention_mask)
        return self._choice.decide(ids, mask, router, temperature, route_on)

    def describe_router(
        self, router: Router | None = None
    ) -> tuple[str, tuple[float | None, float | None]]:
        """The name of a router, by default of the best one, and its thresholds of normalised entropy and of
        the out-of-distribution score, where it has any.

        Raises:
            RoutingError: this artifact has no such router.
        """
        return self._routers.describe(router)

    def mixtures(self, decision: RoutingDecision, router: Router | None = None) -> Tensor:
        """The mixtures that a decision leads to, `[batch, n_experts]` float32, by the policy,
        thresholds, action and fallback of this model."""
        return self._choice.weights(decision, router)

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Any = None,
        mixture: Named | Sequence[Named | None] | None = None,
        route_on: RouteOn | None = None,
        apply: Apply | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate, each row with the experts that its own prompt needs.

        A row keeps its mixture to the end. A cache that this model has filled brings its mixtures
        along, so that a chat which goes on keeps it.

        Args:
            inputs, input_ids: `[batch, length]`; rows that are padded on the right are padded on the
                left instead, as generation needs it.
            attention_mask: `[batch, length]`, 0 for padding.
            mixture: instead of routing: an expert's name, `dense` or weights, for all rows or one for
                each; None in the place of a row routes it.
            route_on: instead of the attribute.
            apply: instead of the attribute.
            kwargs: as for transformers' generate.

        Raises:
            RoutingError: see `route`.
            MixtureError: an unknown expert, a cache of another mixture, a streamer for several rows,
                or continuous batching.
        """
        ids = inputs if input_ids is None else input_ids
        if self._mixer.inside:
            _refuse(mixture, "a mixture is in place: name none")
            return self._serving.own_generate(ids, attention_mask=attention_mask, **kwargs)
        if kwargs.get("cache_implementation") == "paged":
            raise MixtureError("cache_implementation='paged' bypasses generate: use another one")
        cache = caches.given(kwargs)
        with self._mixer.lock:
            ids, mask = self._batches.tokens(ids, attention_mask)
            if not caches.is_filled(cache):
                ids, mask = pad_left(ids, mask)
            rows = self._choice.mixtures(ids, mask, mixture, cache, route_on)
            if kwargs.get("streamer") is not None and len(ids) > 1:
                raise MixtureError(f"a streamer takes one row at a time, got {len(ids)}")
            given = {"inputs": ids, "attention_mask": mask, **kwargs}
            return self._serving.generate(rows, apply or self.apply, given)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        mixture: Named | Sequence[Named | None] | None = None,
        route_on: RouteOn | None = None,
        apply: Apply | None = None,
        **kwargs: Any,
    ) -> Any:
        """The transformers model's forward, each row with the experts that its own context needs.

        What counts as context, for scoring: the tokens before the first label, if `labels` leave
        some out; else everything up to where the chat template opens the last answer; else the whole
        row. Without `attention_mask`, a run of the padding token or of token 0 at the end of a row is
        padding. With a cache that this model has filled, rows keep the mixtures that they
        were computed with. No gradients.

        Args:
            input_ids, attention_mask, args, kwargs: as for the transformers model.
            mixture, route_on, apply: as for `generate`.

        Raises:
            RoutingError: see `route`; or `inputs_embeds` and no mixture.
            MixtureError: an unknown expert, a cache of another mixture, or a model in training.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        given.update(self._serving.positional(args))
        if self._mixer.inside:
            _refuse(mixture, "a mixture is in place: name none")
            return self._serving.forward(**given)
        cache, labels = caches.given(given), given.get("labels")
        with self._mixer.lock:
            if caches.is_filled(cache) or input_ids is None:
                like = input_ids if input_ids is not None else given.get("inputs_embeds")
                if like is None:
                    raise RoutingError("input_ids required")
                context = torch.ones(like.shape[:2], dtype=torch.long)
            else:
                if not isinstance(input_ids, Tensor):
                    got = type(input_ids).__name__
                    raise RoutingError(f"input_ids: a tensor [batch, length] required, got {got}")
                if attention_mask is None:
                    attention_mask = without_padding(input_ids, {0, pad_token(self.model)})
                ids, mask = self._batches.tokens(input_ids, attention_mask)
                context = self._contexts.before_answer(ids, mask, labels)
            rows = self._choice.mixtures(input_ids, context, mixture, cache, route_on)
            return self._serving.run(rows, apply or self.apply, given)

    __call__ = forward

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `[batch, length]` of texts; see `batches.Batches.tokenize`."""
        return self._batches.tokenize(prompts)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `[batch, length]` of rows of any lengths, padded on the left."""
        return self._batches.pad(rows)

    @cached_property
    def _identity(self) -> str:
        """What tells this artifact's mixtures from others': digests of its weights, not of its routers."""
        routers = (self.manifest.router_file, RESPONSE)
        parts = [(n, d.sha256) for n, d in self.manifest.files.items() if n not in routers]
        return json.dumps(
            sorted(p for p in parts if p[0].endswith((".safetensors", "config.json")))
        )


def _forget_remote_code(config: Any) -> None:
    """What is saved from a routed model is the dense expert, without this package's remote code."""
    named = getattr(config, "auto_map", None) or {}
    rest = {name: reference for name, reference in named.items() if not is_ours(reference)}
    if rest:
        config.auto_map = rest
    elif named:
        del config.auto_map


def _refuse(mixture: Any, reason: str) -> None:
    if mixture is not None:
        raise MixtureError(reason)
