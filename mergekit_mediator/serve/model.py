"""MediatorModel: answer each request with the mixture of experts that it needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_mediator.models.contexts import Contexts, RouteOn
from mergekit_mediator.models.loading import DenseCheckpoint
from mergekit_mediator.route.decision import RoutingDecision, Thresholds
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.artifact import attach_artifact, load_artifact
from mergekit_mediator.serve.batch_forms import Apply, Serving
from mergekit_mediator.serve.batches import Batches
from mergekit_mediator.serve.choice import Choice
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import Mixture, Named
from mergekit_mediator.serve.requests import Requests
from mergekit_mediator.serve.residency import Experts, Residency
from mergekit_mediator.serve.routed_class import route_calls
from mergekit_mediator.serve.routers import Router, Routers
from mergekit_mediator.serve.settings import SettingAttributes, Settings
from mergekit_mediator.store.expert_files import ExpertFiles
from mergekit_mediator.store.manifest import Manifest


class MediatorModel(SettingAttributes):
    """A dense expert, its sparse experts, and a router.

    Threads may share a model: one request runs at a time, with its own mixture, and the others wait. Every
    setting of `settings` is an attribute of the model too: `model.policy = "soft"`.

    Attributes:
        root: the artifact's directory.
        model: the routed transformers model: `model.model(...)` and `model.model.generate(...)` call
            `forward` and `generate` below; inside `mixture` they call the stock ones.
        tokenizer: the artifact's tokenizer, or None if it has none.
        manifest: the artifact's manifest.
        settings: the settings that requests are answered with; see `settings.Settings`.
    """

    _plain_attributes = frozenset({"root", "manifest", "model", "tokenizer", "settings"})

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        model: PreTrainedModel,
        tokenizer: Any,
        fetch: Callable[[str], None] | None = None,
        residency: Residency = "device",
        expert_budget: int | None = None,
    ) -> None:
        """Route a loaded model; users call `from_pretrained` or `attach`."""
        self.settings = Settings()
        self.root, self.manifest, self.model, self.tokenizer = root, manifest, model, tokenizer
        dense = DenseCheckpoint(root)
        files = ExpertFiles(root, manifest, dense.shapes, fetch)
        experts = Experts(files, dense.weight, residency, expert_budget)
        self._mixer = Mixer(model, experts, [layer.weights for layer in manifest.routed_layers])
        self._contexts = Contexts(tokenizer)
        self._batches = Batches(root, model, tokenizer)
        self._serving = Serving(model, route_calls(model, self), self._mixer)
        self._routers = Routers(
            root, manifest, model, self._serving.forward, self._mixer, self._contexts, dense.shapes
        )
        self._choice = Choice(self.settings, self._mixer, self._routers, self._contexts)
        self._requests = Requests(
            self._mixer, self._batches, self._contexts, self._choice, self._serving
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        experts: Iterable[str] = (),
        verify: bool = True,
        trust_remote_code: bool = False,
        residency: Residency = "device",
        expert_budget: int | None = None,
        **kwargs: Any,
    ) -> "MediatorModel":
        """Load an artifact from a directory or from the Hub.

        Args:
            source: a directory, or the name of a repository on the Hub.
            revision: the repository's branch, tag or commit.
            experts: the experts whose files are fetched at once. The file of another expert is fetched when
                a mixture first needs it. A directory holds all files already.
            verify: check the digest of every file before it is used; this takes as long as reading the file.
            trust_remote_code: let the code of the artifact's base model run: of its tokenizer, its
                configuration and its model. The user is never asked.
            residency: where decoded experts stay: `device`, `cpu` or `disk`; see `residency.Experts`.
            expert_budget: the bytes that all decoded experts together may take; None is no limit.
            kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`, among them `token`,
                `cache_dir` and `local_files_only`; the default of `dtype` is the stored dtype.

        Raises:
            ArtifactError: there is no artifact, a file is missing or altered, or the artifact needs code
                that may not run.
            ShareError: the repository cannot be read.
            MixtureError: an expert is unknown; or experts cannot be put into the model, because it is
                quantised or its weights have another shape.
        """
        experts = tuple(experts)
        artifact = load_artifact(source, revision, verify, trust_remote_code, experts, **kwargs)
        loaded = cls(*artifact, residency=residency, expert_budget=expert_budget)
        loaded._mixer.open(Mixture.of(name, artifact.manifest.expert_names) for name in experts)
        return loaded

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
            model: the transformers model; it holds the artifact's dense expert.
            source: the artifact's directory, or the name of a repository on the Hub.
            revision: the repository's branch, tag or commit; the default is the model's commit, if
                transformers knows it.
            verify: check the digest of every file first; this takes as long as reading the files.
            trust_remote_code: let the code of the artifact's tokenizer run. The user is never asked.

        Raises:
            ArtifactError: there is no artifact, a file is missing or altered, or the tokenizer needs code
                that may not run.
            MixtureError: experts cannot be put into the model, because it is quantised or its weights
                have another shape.
        """
        return cls(*attach_artifact(model, source, revision, verify, trust_remote_code))

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts, in the order of a routing decision's columns."""
        return self.manifest.expert_names

    @property
    def resident_bytes(self) -> int:
        """The bytes that decoded experts take in memory now."""
        return self._mixer.resident_bytes

    def mixture(self, weights: Named) -> AbstractContextManager[PreTrainedModel]:
        """Put W_dense + Σ_t p_t Δ_t in place inside a context, which yields the transformers model.

        Inside, the model is its stock class: no call is routed. Other threads wait. At the end the dense
        expert comes back, bit for bit.

        Args:
            weights: a weight of at least 0 by expert, or an expert's name; no weights are the dense expert.

        Raises:
            MixtureError: see `mixer.Mixer.mixture`.
        """
        mixture: Any = self._mixer.mixture(self._choice.named(weights))
        return cast(AbstractContextManager[PreTrainedModel], mixture)

    def mixture_digest(self, mixture: Named | Sequence[Named]) -> str:
        """Make a key for caches of the results of a mixture, or of one mixture for each row of a batch.

        Returns:
            32 hexadecimal digits that differ between artifacts and between mixtures.
        """
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
        """Decide which experts each prompt needs, once for the whole prompt.

        Args:
            prompts: texts, to which a chat template is applied if there is one; or token ids
                `[batch, length]`; or a tokenizer's output.
            attention_mask: `[batch, length]`, 0 for padding; it comes with token ids.
            router: `calibrated`; `response`, which takes one pass of the dense expert; or `likelihood`,
                which compares the prompt's likelihood under each expert. The default is the first of
                these that the artifact has.
            temperature: the temperature of the softmax over experts, in the router's own unit.
            route_on: replaces the setting.

        Returns:
            A decision with weights `[batch, n_experts]`, entropy `[batch]` in nats, ood `[batch]`, and
            experts.

        Raises:
            RoutingError: the batch or a prompt is empty, or a prompt is longer than the model's context.
            MixtureError: a mixture is in place.
        """
        ids, mask = self._batches.tokens(prompts, attention_mask)
        return self._choice.decide(ids, mask, router, temperature, route_on)

    def describe_router(self, router: Router | None = None) -> tuple[str, Thresholds]:
        """Return the name of a router and its thresholds.

        Args:
            router: the router's name; the default is the best router that the artifact has.

        Returns:
            The name and the thresholds.

        Raises:
            ArtifactError: a router's file is damaged or does not fit the model.
        """
        return self._routers.describe(router)

    def mixtures(self, decision: RoutingDecision, router: Router | None = None) -> Tensor:
        """Turn a routing decision into mixtures, `[batch, n_experts]` float32, by this model's settings.

        Raises:
            RoutingError: a row is refused, or the settings have an action for requests that are out of
                distribution and the router has no threshold for them.
        """
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
        """Run the generate of transformers, each row with the experts that its own prompt needs.

        A row keeps its mixture to the end. A cache that this model has filled carries its mixtures, so that
        the next turn of a chat keeps the mixture of the first.

        Args:
            inputs: token ids `[batch, length]`, texts, or a tokenizer's output. Padding on the right is
                moved to the left, where generation needs it.
            attention_mask: `[batch, length]`, 0 for padding.
            input_ids: another name of `inputs`.
            mixture: replaces routing: an expert's name, `dense` or weights by expert, for all rows or one
                for each row; a row whose mixture is None is routed.
            route_on: replaces the setting.
            apply: replaces the setting.
            kwargs: further arguments of transformers' generate.

        Returns:
            The result of transformers' generate; token ids `[batch, length + new tokens]` by default.

        Raises:
            RoutingError: see `route`.
            MixtureError: an expert is unknown, the cache belongs to another mixture, a streamer gets
                several rows, or the cache is paged.
        """
        ids = inputs if input_ids is None else input_ids
        return self._requests.generate(
            ids, attention_mask, mixture, route_on, apply or self.apply, kwargs
        )

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
        """Run the forward of the transformers model, each row with the experts that its context needs.

        The context is the tokens before the first label, if `labels` leave some tokens out; else the tokens
        up to where the chat template opens the last answer; else the whole row. Without `attention_mask`, a
        run of the padding token or of token 0 at the end of a row is padding. With a cache that this model
        has filled, a row keeps the mixture that the cache was computed with. There are no gradients.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`, 0 for padding.
            args: further positional arguments of the transformers model.
            mixture: see `generate`.
            route_on: replaces the setting.
            apply: replaces the setting.
            kwargs: further arguments of the transformers model.

        Returns:
            The output of the transformers model; its logits are `[batch, length, vocabulary]`.

        Raises:
            RoutingError: see `route`; or `inputs_embeds` come without a mixture.
            MixtureError: an expert is unknown, the cache belongs to another mixture, or the model is in
                training.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs.update(self._serving.positional(args))
        return self._requests.forward(inputs, mixture, route_on, apply or self.apply)

    __call__ = forward

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize texts: token ids and attention mask `[batch, length]`, padded on the left.

        Raises:
            RoutingError: see `batches.Batches.tokenize`.
        """
        return self._batches.tokenize(prompts)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad rows of any lengths on the left: token ids and attention mask `[batch, length]`."""
        return self._batches.pad(rows)

    @cached_property
    def _identity(self) -> str:
        return caches.identity(self.manifest)
