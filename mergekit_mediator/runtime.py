"""MediatorModel: loads an artifact, routes requests to mixtures of experts, generates, and restores."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mergekit_mediator import artifact
from mergekit_mediator.artifact import Manifest
from mergekit_mediator.errors import ArtifactError, MixtureError, RoutingError
from mergekit_mediator.locate import locate_weights
from mergekit_mediator.mixture import Mixer
from mergekit_mediator.prompts import render
from mergekit_mediator.response import ResponseRouter
from mergekit_mediator.router import Policy, RoutingDecision, apply_policy, decide_from_scores

Router = Literal["response", "likelihood"]


class MediatorModel:
    """A dense expert, its sparse experts, and a router.

    Attributes:
        model: the transformers model. It holds the dense expert except inside a mixture.
        tokenizer: of the artifact, or None if it has none.
        manifest: of the artifact.
        policy: how probabilities become a mixture; see `router.apply_policy`.
        entropy_threshold: of the policy `auto`, as a fraction of log(number of experts).
    """

    def __init__(
        self, root: Path, manifest: Manifest, model: PreTrainedModel, tokenizer: Any
    ) -> None:
        """Use `from_pretrained`."""
        self.root, self.manifest, self.model, self.tokenizer = root, manifest, model, tokenizer
        self.policy: Policy = "auto"
        self.entropy_threshold = 0.5
        experts = {entry.name: artifact.open_expert(root, entry) for entry in manifest.experts}
        shapes = {w: d.shape for file in experts.values() for w, d in file.weights.items()}
        self._mixer = Mixer(locate_weights(model, shapes, shapes), experts, self._dense_weight)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, verify: bool = True, **kwargs: Any
    ) -> "MediatorModel":
        """Load an artifact from a directory or from the Hub.

        Args:
            source: a directory, or a repository's name on the Hub.
            revision: of the repository.
            verify: check the digest of every file first, at the speed of reading it.
            kwargs: as for `AutoModelForCausalLM.from_pretrained`; `dtype` is the stored one
                unless given.

        Raises:
            ArtifactError: there is no artifact, or a file of it is missing or altered.
            MixtureError: the model was loaded in a form that experts cannot be put into.
        """
        root = _local(source, revision)
        manifest = artifact.read_manifest(root)
        if verify:
            artifact.verify_files(root, manifest)
        kwargs.setdefault("dtype", "auto")
        model = AutoModelForCausalLM.from_pretrained(root, **kwargs).eval()
        has_tokenizer = any(
            (root / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
        )
        tokenizer = AutoTokenizer.from_pretrained(root) if has_tokenizer else None
        return cls(root, manifest, model, tokenizer)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in the order of the columns of a routing decision."""
        return self.manifest.expert_names

    @contextmanager
    def mixture(self, weights: Mapping[str, float]) -> Iterator[PreTrainedModel]:
        """Put W_dense + Σ_t p_t Δ_t in place; yields the model, and restores the dense expert after.

        Raises:
            MixtureError: see `mixture.Mixer.mixture`.
        """
        with self._mixer.mixture(weights):
            yield self.model

    def route(
        self,
        prompts: str | Sequence[str] | Tensor | Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        router: Router | None = None,
        temperature: float | None = None,
    ) -> RoutingDecision:
        """Which experts each prompt needs, decided once on the whole prompt.

        Args:
            prompts: texts, put through the chat template if there is one; or token ids
                `[batch, length]`; or a tokenizer's output.
            attention_mask: `[batch, length]`, 0 for padding, with token ids.
            router: `response`, from one pass of the dense expert, or `likelihood`, from the
                prompt's likelihood under each expert; the first is the default where the artifact
                has its directions.
            temperature: of the softmax over experts, in the router's own unit.

        Returns:
            weights `[batch, n_experts]`, entropy `[batch]` in nats, ood `[batch]`, experts.

        Raises:
            RoutingError: an empty prompt or batch, or a prompt longer than the model's context.
            MixtureError: a mixture is in place.
        """
        ids, mask = self._tokens(prompts, attention_mask)
        chosen: str = router or ("response" if self._response_router else "likelihood")
        if self._mixer.active:
            raise MixtureError("routing needs the dense expert: leave the mixture first")
        if chosen == "likelihood":
            return self._route_by_likelihood(ids, mask, 1.0 if temperature is None else temperature)
        if chosen != "response":
            raise RoutingError(f"unknown router {chosen!r}: choose response or likelihood")
        responses, router = self._responses(ids, mask)
        given = {} if temperature is None else {"temperature": temperature}
        return router.decide(responses, self._reference, **given)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        mixture: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate, each row with the experts that its own prompt needs.

        Rows that need the same mixture run together; the results are padded to one length.

        Args:
            input_ids: `[batch, length]`; rows that are padded on the right are padded on the left
                instead, as generation needs it.
            attention_mask: `[batch, length]`, 0 for padding.
            mixture: this one for all rows, instead of routing.
            kwargs: as for transformers' generate.
        """
        ids, mask = _pad_left(*self._tokens(input_ids, attention_mask))
        if mixture is not None:
            with self.mixture(mixture):
                return self.model.generate(input_ids=ids, attention_mask=mask, **kwargs)
        groups = self._groups(
            apply_policy(self.route(ids, mask), self.policy, self.entropy_threshold)
        )
        if len(groups) > 1 and kwargs.get("return_dict_in_generate"):
            raise MixtureError(
                f"return_dict_in_generate: these rows need {len(groups)} different mixtures: "
                "generate them one batch for each"
            )
        results = {}
        for weights, rows in groups.items():
            with self.mixture(dict(weights)):
                output = self.model.generate(
                    input_ids=ids[rows], attention_mask=mask[rows], **kwargs
                )
            if len(groups) == 1:
                return output
            results.update(zip(rows, output.unflatten(0, (len(rows), -1)), strict=True))
        width = max(row.shape[-1] for row in results.values())
        pad = _pad_token(self.model)
        padded = [
            torch.nn.functional.pad(results[row], (0, width - results[row].shape[-1]), value=pad)
            for row in sorted(results)
        ]
        return torch.cat(padded)

    def _groups(self, weights: Tensor) -> dict[tuple[tuple[str, float], ...], list[int]]:
        """Rows by the mixture they need."""
        groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for row, values in enumerate(weights.tolist()):
            key = tuple((e, p) for e, p in zip(self.experts, values, strict=True) if p > 0)
            groups.setdefault(key, []).append(row)
        return groups

    def _tokens(self, prompts: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `[batch, length]` on the model's device, checked."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, Mapping):
            prompts, attention_mask = prompts["input_ids"], prompts.get("attention_mask")
        if not isinstance(prompts, Tensor):
            prompts, attention_mask = self.tokenize(prompts)
        ids = prompts.to(self.model.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
        if ids.ndim != 2 or not len(ids):
            raise RoutingError(f"token ids [batch, length] required, got shape {list(ids.shape)}")
        if not bool(mask.any(dim=1).all()):
            raise RoutingError("an empty prompt cannot be routed: give it text, or name a mixture")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit:
            raise RoutingError(
                f"prompt of {ids.shape[1]} tokens: this model takes at most {limit}: shorten it"
            )
        return ids, mask

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `[batch, length]` of texts, through the chat template, padded left.

        Raises:
            RoutingError: no prompts, an empty one, or an artifact without a tokenizer.
        """
        if self.tokenizer is None:
            raise RoutingError(f"{self.root}: has no tokenizer: give token ids instead of text")
        if not prompts:
            raise RoutingError("no prompts given")
        if not all(prompt.strip() for prompt in prompts):
            raise RoutingError("an empty prompt cannot be routed: give it text, or name a mixture")
        return self.pad([render(self.tokenizer, prompt) for prompt in prompts])

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `[batch, length]` of rows of any lengths, padded on the left."""
        tensors = [torch.tensor(row) for row in rows]
        pad = {"batch_first": True, "padding_side": "left"}
        ids = torch.nn.utils.rnn.pad_sequence(tensors, padding_value=_pad_token(self.model), **pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], **pad)
        return ids, mask

    @cached_property
    def _response_router(self) -> ResponseRouter | None:
        """The router that needs no data, or None where it has nothing to measure in this model."""
        path = self.root / artifact.RESPONSE
        if not path.exists():
            return None
        router = ResponseRouter.load(path)
        return router if router.applies_to(self.model) else None

    @cached_property
    def _opening(self) -> list[int]:
        """The token ids that every prompt begins with: the chat template up to the user's text."""
        if self.tokenizer is None:
            return []
        pairs = zip(render(self.tokenizer, ""), render(self.tokenizer, "x"), strict=False)
        return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    @cached_property
    def _reference(self) -> dict[str, Tensor]:
        """The responses to a prompt that says nothing: the chat template around an empty message."""
        tokens = render(self.tokenizer, "") if self.tokenizer else []
        ids = torch.tensor([tokens or [_pad_token(self.model)]], device=self.model.device)
        responses, _ = self._responses(ids, torch.ones_like(ids))
        return responses

    @torch.no_grad()
    def _responses(self, ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], ResponseRouter]:
        if self._response_router is None:
            raise RoutingError(
                f"{self.root}: response routing has nothing to measure in this model: use the "
                "likelihood router, or calibrate one"
            )
        with self._response_router.recording(self.model, self._counted(ids, mask)) as responses:
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return responses, self._response_router

    def _counted(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The tokens that tell requests apart: no padding, and not what every prompt begins with."""
        counted = mask.bool().clone()
        for row, (tokens, keep) in enumerate(zip(ids.tolist(), counted.tolist(), strict=True)):
            places = [place for place, kept in enumerate(keep) if kept]
            opening = places[: len(self._opening)]
            if len(places) > len(opening) and [tokens[p] for p in opening] == self._opening:
                counted[row, opening] = False
        return counted

    @torch.no_grad()
    def _route_by_likelihood(
        self, ids: Tensor, mask: Tensor, temperature: float
    ) -> RoutingDecision:
        """p(t | prompt) ∝ exp((L_t − L_dense) / T), with L in nats over the whole prompt."""
        dense = self._log_likelihood(ids, mask)
        scores = []
        for name in self.experts:
            with self.mixture({name: 1.0}):
                scores.append(self._log_likelihood(ids, mask) - dense)
        return decide_from_scores(torch.stack(scores, dim=1), self.experts, temperature)

    def _log_likelihood(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Nats `[batch]` of all tokens but the first, in float32."""
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        tokens = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (tokens * (mask[:, 1:] * mask[:, :-1])).sum(dim=1)

    @cached_property
    def _shards(self) -> dict[str, Any]:
        """The dense checkpoint's open files by weight."""
        shards = {}
        for path in sorted(self.root.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            shards.update(dict.fromkeys(file.keys(), file))
        return shards

    def _dense_weight(self, name: str) -> Tensor:
        """A weight of the dense expert as stored, memory-mapped."""
        if name not in self._shards:
            raise ArtifactError(f"{self.root}: {name} is routed, but not in the dense checkpoint")
        weight: Tensor = self._shards[name].get_tensor(name)
        return weight


def load_plain(source: str | Path) -> PreTrainedModel:
    """An ordinary causal language model, in its stored dtype.

    Raises:
        ArtifactError: it cannot be loaded.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{source}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.eval()


def _local(source: str | Path, revision: str | None) -> Path:
    """The directory of an artifact, downloaded if it is not one."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ArtifactError(
            f"{source}: neither a directory nor a repository on the Hub: {error}"
        ) from error


def _pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows `[batch, length]` with their padding in front."""
    if bool(mask[:, -1].all()):
        return ids, mask
    order = mask.bool().to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _pad_token(model: PreTrainedModel) -> int:
    """The token to pad with: the model's, or the end of sequence, or 0."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(model.generation_config, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
