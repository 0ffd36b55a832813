"""Routers outside the engine: one that reads the embedding table alone, or all others in a process of their own."""

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
from mergekit_mediator.route.decision import RoutingDecision
from mergekit_mediator.route.features import mean_embedding
from mergekit_mediator.store.manifest import ROUTER, Manifest

Thresholds = tuple[float | None, float | None]


class Decider(Protocol):
    """Routes prompts.

    Attributes:
        name: of the router, with its accuracy if that was measured.
        thresholds: the router's own, of normalised entropy and of the out-of-distribution score.
    """

    name: str
    thresholds: Thresholds

    async def decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        """Which experts each prompt needs."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class EmbeddingDecider:
    """A calibrated router on mean embeddings: it needs the tokenizer and the embedding table, which is mapped."""

    def __init__(self, root: Path, manifest: Manifest, router_file: Path) -> None:
        """Args:
            root: of the artifact.
            manifest: of the artifact.
            router_file: of the calibrated router.

        Raises:
            RoutingError: the artifact has no tokenizer, or the router takes other features.
        """
        self._router = CalibratedRouter.load(router_file)
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
        self.thresholds: Thresholds = (numbers["entropy_threshold"], numbers["ood_threshold"])

    async def decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        return await asyncio.to_thread(self._decide, prompts, route_on)

    def _decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        features = []
        for prompt in prompts:
            ids = torch.tensor([token_ids(self._tokenizer, prompt, len(self._table))])
            counted = self._contexts.counted(ids, torch.ones_like(ids), route_on)
            features.append(mean_embedding(ids, counted, self._table, self._router.tokens))
        return self._router.decide(torch.cat(features))

    def close(self) -> None:
        self._table = torch.empty(0)


class ProcessDecider:
    """Any router of an artifact, on a dense expert of its own in another process."""

    def __init__(self, root: Path, manifest: Manifest, router: RouterName) -> None:
        """Args:
            root: of the artifact.
            manifest: of the artifact.
            router: `auto` is the artifact's best.

        Raises:
            MediatorError: the artifact cannot be loaded, or has no such router.
        """
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _load, (str(root), router))
        # the first call loads the model: what fails, fails at the start
        self.name, self.thresholds = self._pool.submit(_describe).result()
        self.name += _accuracy(manifest) if self.name in ("hidden", "calibrated") else ""

    async def decide(self, prompts: Sequence[Routable], route_on: RouteOn) -> RoutingDecision:
        """Which experts each prompt needs.

        Raises:
            RoutingError: a prompt that cannot be routed.
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
        self._pool.shutdown(wait=False, cancel_futures=True)


def token_ids(tokenizer: Any, prompt: Routable, vocabulary: int) -> list[int]:
    """The token ids of a prompt, which may be token ids already.

    Args:
        tokenizer: of the artifact.
        prompt: text, turns or token ids.
        vocabulary: how many tokens the model has.

    Raises:
        RoutingError: a token id that the model does not have.
    """
    if not (isinstance(prompt, tuple) and prompt and isinstance(prompt[0], int)):
        return render(tokenizer, prompt)  # type: ignore[arg-type]
    ids = [int(token) for token in prompt if isinstance(token, int)]
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RoutingError(
            f"prompt: token ids from 0 to {vocabulary - 1} required, got {min(ids)} to {max(ids)}"
        )
    return ids


def choose_decider(root: Path, manifest: Manifest, router: RouterName) -> Decider:
    """The router of a service: the best one that needs no second model in memory, unless one is named.

    Raises:
        RoutingError: the artifact has no such router.
    """
    kind = (manifest.router or {}).get("features")
    if router == "embedding" or (router == "auto" and kind == "embedding"):
        return EmbeddingDecider(root, manifest, root / ROUTER)
    return ProcessDecider(root, manifest, router)


def _accuracy(manifest: Manifest) -> str:
    accuracy = (manifest.router or {}).get("accuracy")
    return "" if accuracy is None else f" ({100 * accuracy:.1f}% of held-out prompts right)"


# In the other process.
_loaded: Any = None
_router: Any = None


def _load(root: str, router: RouterName) -> None:
    from mergekit_mediator.serve.model import MediatorModel

    global _loaded, _router
    torch.set_num_threads(1)
    _loaded = MediatorModel.from_pretrained(root, verify=False, residency="disk")
    _router = None if router == "auto" else router


def _describe() -> tuple[str, Thresholds]:
    return _loaded.describe_router(_router)  # type: ignore[no-any-return]


def _decide_there(
    prompts: Sequence[Routable], route_on: RouteOn
) -> tuple[list[list[float]], list[float], list[float], tuple[str, ...]]:
    vocabulary = _loaded.model.get_input_embeddings().num_embeddings
    ids, mask = _loaded.pad([token_ids(_loaded.tokenizer, p, vocabulary) for p in prompts])
    decision = _loaded.route(ids, mask, router=_router, route_on=route_on)
    rows = (decision.weights.tolist(), decision.entropy.tolist(), decision.ood.tolist())
    return *rows, decision.experts
