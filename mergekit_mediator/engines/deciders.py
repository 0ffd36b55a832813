"""Routers of services: one reads the embedding table alone, and the others run a model in another process."""

import asyncio
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import torch

from mergekit_mediator.engines.conversation import Routable
from mergekit_mediator.engines.settings import RouterName
from mergekit_mediator.errors import EngineError, RoutingError
from mergekit_mediator.models.contexts import Contexts, RouteOn
from mergekit_mediator.models.loading import DenseCheckpoint, load_tokenizer
from mergekit_mediator.models.modules import input_embedding
from mergekit_mediator.models.prompts import render
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.calibrated_file import check_known
from mergekit_mediator.route.decision import RoutingDecision, Thresholds, for_experts
from mergekit_mediator.route.features import mean_embedding
from mergekit_mediator.serve.routers import unsure_of
from mergekit_mediator.store.manifest import ROUTER, Manifest


class Decider(Protocol):
    """A router of prompts.

    Attributes:
        name: the router's name, with its accuracy if `calibrate` measured it.
        thresholds: the router's thresholds.
    """

    name: str
    thresholds: Thresholds

    async def decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        """Decide which experts each prompt needs, in a decision with one row for each prompt.

        Raises:
            PromptError: a prompt cannot be turned into tokens.
            RoutingError: a prompt cannot be routed.
            EngineError: the router has ended.
        """
        ...

    def close(self) -> None:
        """Free the router's memory and processes."""
        ...


class EmbeddingDecider:
    """A calibrated router on mean embeddings.

    It needs the tokenizer and the embedding table, which is memory-mapped.
    """

    def __init__(self, root: Path, manifest: Manifest, router_file: Path) -> None:
        """Load the router and the tokenizer.

        Args:
            root: the artifact's directory.
            manifest: the artifact's manifest.
            router_file: the file of the calibrated router.

        Raises:
            RoutingError: the artifact has no tokenizer, or the router takes other features.
        """
        self._router, self._experts = CalibratedRouter.load(router_file), manifest.expert_names
        check_known(self._router.experts, self._experts, router_file)
        self._tokenizer: Any = load_tokenizer(root)
        if self._tokenizer is None or self._router.kind != "embedding":
            raise RoutingError(
                f"{root}: routing by embedding needs a tokenizer, and a router that was calibrated with "
                "`mergekit-mediator calibrate --features embedding`"
            )
        self._contexts = Contexts(self._tokenizer)
        self._table = DenseCheckpoint(root).weight(input_embedding(root))
        self.name = f"embedding{_accuracy(manifest)}"
        numbers = self._router.numbers
        self.thresholds = Thresholds(
            numbers["entropy_threshold"], numbers["ood_threshold"], unsure_of(manifest)
        )

    async def decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        """See `Decider.decide`; it runs in a thread."""
        return await asyncio.to_thread(self._decide, prompts, route_on)

    def _decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        features = []
        for prompt in prompts:
            ids = torch.tensor([token_ids(self._tokenizer, prompt, len(self._table))])
            counted = self._contexts.counted(ids, torch.ones_like(ids), route_on)
            features.append(mean_embedding(ids, counted, self._table, self._router.tokens))
        return for_experts(self._router.decide(torch.cat(features)), self._experts)

    def close(self) -> None:
        """See `Decider.close`."""
        self._table = torch.empty(0)


class ProcessDecider:
    """Any router of an artifact, with a dense expert of its own in another process."""

    def __init__(self, root: Path, manifest: Manifest, router: RouterName) -> None:
        """Start the process and load the model in it.

        Args:
            root: the artifact's directory.
            manifest: the artifact's manifest.
            router: the router's name; `auto` is the best router that the artifact has.

        Raises:
            EngineError: the process ends while it loads the model.
            MediatorError: the artifact cannot be loaded, or has no such router.
        """
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            # The first decision refuses a router that the artifact does not have.
            self.name, self.thresholds = self._pool.submit(_load, str(root), router).result()
            self._pool.submit(_decide_there, ((0,),), "prompt").result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"{root}: the router's process ended while it loaded the model: check the memory"
            ) from error
        except Exception:
            self.close()
            raise
        self.name += _accuracy(manifest) if self.name in ("hidden", "calibrated") else ""

    async def decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        """See `Decider.decide`; it runs in the process.

        Raises:
            PromptError: a prompt cannot be turned into tokens.
            RoutingError: a prompt cannot be routed.
            EngineError: the process has ended.
        """
        try:
            future = self._pool.submit(_decide_there, tuple(prompts), route_on)
            weights, entropy, ood, experts = await asyncio.wrap_future(future)
        except BrokenProcessPool as error:
            raise EngineError("the router's process has ended: start the server again") from error
        return RoutingDecision(
            torch.tensor(weights), torch.tensor(entropy), torch.tensor(ood), experts
        )

    def close(self) -> None:
        """See `Decider.close`."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def token_ids(tokenizer: Any, prompt: Routable, vocabulary: int) -> list[int]:
    """Return the token ids of a prompt, which may be token ids already.

    Args:
        tokenizer: the artifact's tokenizer, or None if it has none.
        prompt: text, turns or token ids.
        vocabulary: the number of the model's tokens.

    Raises:
        RoutingError: the model has no token of an id, or a text comes without a tokenizer.
    """
    if not (isinstance(prompt, tuple) and prompt and isinstance(prompt[0], int)):
        if tokenizer is None:
            raise RoutingError(
                "the artifact has no tokenizer, and a text needs one: send token ids"
            )
        return render(tokenizer, prompt)  # type: ignore[arg-type]
    ids = [int(token) for token in prompt if isinstance(token, int)]
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RoutingError(
            f"prompt: token ids from 0 to {vocabulary - 1} are required, got {min(ids)} to {max(ids)}"
        )
    return ids


def choose_decider(root: Path, manifest: Manifest, router: RouterName) -> Decider:
    """Load the router of a service.

    Args:
        root: the artifact's directory.
        manifest: the artifact's manifest.
        router: the router's name; `auto` is `embedding` if the artifact is calibrated for it, because that
            needs no second model in memory, and else the best router that the artifact has.

    Raises:
        EngineError: the router's process ends while it loads the model.
        MediatorError: the artifact cannot be loaded, or has no such router.
    """
    kind = (manifest.router or {}).get("features")
    if router == "embedding" or (router == "auto" and kind == "embedding"):
        return EmbeddingDecider(root, manifest, root / (manifest.router_file or ROUTER))
    return ProcessDecider(root, manifest, router)


def _accuracy(manifest: Manifest) -> str:
    """Tell the measured accuracy of the calibrated router; an empty text if it was not measured."""
    accuracy = (manifest.router or {}).get("accuracy")
    return "" if accuracy is None else f" ({100 * accuracy:.1f}% of held-out prompts right)"


# The model and the router's name in the other process.
_loaded: Any = None
_router: Any = None


def _load(root: str, router: RouterName) -> tuple[str, Thresholds]:
    """Load the model in the other process; return the router's name and thresholds."""
    from mergekit_mediator.serve.model import MediatorModel

    global _loaded, _router
    torch.set_num_threads(1)
    _loaded = MediatorModel.from_pretrained(root, verify=False, residency="disk")
    _router = None if router == "auto" else router
    return _loaded.describe_router(_router)  # type: ignore[no-any-return]


def _decide_there(
    prompts: Sequence[Routable], route_on: RouteOn
) -> tuple[list[list[float]], list[float], list[float], tuple[str, ...]]:
    """Decide in the other process, one prompt at a time, so that memory grows with the longest prompt alone."""
    vocabulary = _loaded.model.get_input_embeddings().num_embeddings
    decisions = []
    for prompt in prompts:
        ids, mask = _loaded.pad([token_ids(_loaded.tokenizer, prompt, vocabulary)])
        decisions.append(_loaded.route(ids, mask, router=_router, route_on=route_on))
    weights = [decision.weights[0].tolist() for decision in decisions]
    entropy = [float(decision.entropy[0]) for decision in decisions]
    return weights, entropy, [float(d.ood[0]) for d in decisions], decisions[0].experts
