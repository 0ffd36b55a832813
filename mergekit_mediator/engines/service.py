"""Choose the adapter that answers a request (a named expert, a blend or `auto`), and bound the blends."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from mergekit_mediator.engines.conversation import routables
from mergekit_mediator.engines.deciders import Decider
from mergekit_mediator.engines.names import AUTO, name_of, parse, rounded
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import (
    EngineError,
    MediatorError,
    MixtureError,
    PromptError,
    RoutingError,
    SettingError,
)
from mergekit_mediator.serve.choice import mixtures_of
from mergekit_mediator.serve.mixture import DENSE, Mixture


class RequestError(Exception):
    """A request that cannot be answered, told in the form of OpenAI's errors.

    Attributes:
        status: the HTTP status of the response.
        kind: OpenAI's type of the error.
        param: the field of the request that is wrong, or None.
    """

    def __init__(self, message: str, status: int, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param

    def body(self) -> dict[str, Any]:
        """Return the response's JSON object."""
        fields = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": fields}


@dataclass(frozen=True)
class Resolved:
    """The mixture that answers a request.

    Attributes:
        name: the name of the mixture's adapter; see `names.name_of`.
        mixture: the mixture.
        figures: the routing decision's `entropy` in nats and `ood` score; empty if the request named a model.
    """

    name: str
    mixture: Mixture
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that tells the client the mixture and the figures."""
        return {"mixture": dict(self.mixture.weights), **self.figures}


class Adapters(Protocol):
    """The adapters of an engine."""

    async def add(self, mixture: Mixture) -> None:
        """Give a mixture's adapter to the engine, unless the engine has it.

        Raises:
            MediatorError: the engine cannot be given the adapter.
        """
        ...

    async def remove(self, mixture: Mixture) -> None:
        """Take a blend's adapter out of the engine.

        Raises:
            MediatorError: the engine fails.
        """
        ...

    def engine_name(self, mixture: Mixture) -> str:
        """Return the model name by which the engine knows an added mixture."""
        ...

    @property
    def dense_names(self) -> frozenset[str]:
        """The engine's own names of the dense expert."""
        ...


class Service:
    """A resolver of the model names in requests to adapters of one engine.

    At most `settings.blends` blends are alive, and a blend in use stays alive. The least recently used blend
    leaves for a new one, so no client fills memory by naming blends.
    """

    def __init__(
        self,
        experts: tuple[str, ...],
        decider: Decider,
        adapters: Adapters,
        settings: ServiceSettings,
    ) -> None:
        """Start without blends.

        Args:
            experts: the artifact's experts, in its order.
            decider: routes prompts.
            adapters: the engine's adapters.
            settings: the service's settings.

        Raises:
            MixtureError: the fallback is no expert.
            SettingError: the settings have an action for requests that are out of distribution, and the
                router does not recognise such requests.
        """
        self.experts, self.settings = experts, settings
        self._decider, self._adapters = decider, adapters
        self._answering = settings.answering()
        self._fallback = (
            None if settings.fallback is None else Mixture.of(settings.fallback, experts)
        )
        has_threshold = settings.ood_threshold is not None or decider.thresholds.ood is not None
        if settings.ood_action != "blend" and not has_threshold:
            raise SettingError(
                f"MEDIATOR_OOD_ACTION: {settings.ood_action} needs a router with a threshold for requests "
                f"that are out of distribution, and {decider.name} has none: run `mergekit-mediator "
                "calibrate`, or set MEDIATOR_OOD_THRESHOLD"
            )
        # The number of requests that use each blend; the least recently used blend comes first.
        self._blends: OrderedDict[Mixture, int] = OrderedDict()
        self._lock = asyncio.Lock()

    def engine_name(self, answer: Resolved) -> str:
        """Return the model name by which the engine knows the adapter that answers."""
        return self._adapters.engine_name(answer.mixture)

    @asynccontextmanager
    async def resolved(
        self, model: str | None, body: Mapping[str, Any]
    ) -> AsyncIterator[Resolved | None]:
        """Keep the adapter that answers a request in the engine inside a context.

        Args:
            model: the request's model name; None or an empty name is the dense expert, as in engines.
            body: the request's JSON object; its prompts are routed if the model is `auto`.

        Yields:
            The mixture; None if the model is another one of the engine.

        Raises:
            RequestError: an expert is unknown, the weights make no mixture, the request cannot be routed
                or is refused, more blends are in use than may be alive, or the engine cannot be given the
                adapter.
        """
        answer = await self._resolve(model, body)
        if answer is None:
            yield None
        elif answer.mixture.is_dense or answer.mixture.alone:
            await self._add(answer.mixture)
            yield answer
        else:
            answer = await self._begin(answer, model == AUTO)
            try:
                yield answer
            finally:
                if answer.mixture in self._blends:
                    self._blends[answer.mixture] -= 1

    async def _resolve(self, model: str | None, body: Mapping[str, Any]) -> Resolved | None:
        if model == AUTO:
            return await self._route(body)
        if not model or model in self._adapters.dense_names:
            return Resolved(name_of(DENSE), DENSE)
        try:
            mixture = parse(model, self.experts, self.settings.grid)
        except MixtureError as error:
            is_unknown = str(error).startswith("unknown expert")
            raise RequestError(
                str(error),
                404 if is_unknown else 400,
                "NotFoundError" if is_unknown else "BadRequestError",
                "model",
            ) from error
        return None if mixture is None else Resolved(name_of(mixture), mixture)

    async def _add(self, mixture: Mixture) -> None:
        with _unavailable():
            await self._adapters.add(mixture)

    async def _route(self, body: Mapping[str, Any]) -> Resolved:
        try:
            prompts = routables(body)
        except PromptError as error:
            if self._fallback is not None:
                return Resolved(name_of(self._fallback), self._fallback)
            raise RequestError(str(error), 400, "BadRequestError", "messages") from error
        try:
            decision = await self._decider.decide(prompts, self._answering.route_on)
            weights = mixtures_of(
                decision, self._answering, self._decider.thresholds, self.experts
            ).mean(dim=0)
        except (PromptError, RoutingError) as error:
            raise RequestError(str(error), 400, "BadRequestError", "messages") from error
        except EngineError as error:
            raise RequestError(str(error), 503, "ServiceUnavailableError") from error
        mixture = rounded(Mixture.of_row(weights.tolist(), self.experts), self.settings.grid)
        figures = {"entropy": round(float(decision.entropy.mean()), 4)}
        ood = float(decision.ood.mean())
        if not math.isnan(ood):  # a router without a distance gives NaN
            figures["ood"] = round(ood, 4)
        return Resolved(name_of(mixture), mixture, figures)

    async def _begin(self, answer: Resolved, routed: bool) -> Resolved:
        """Give a blend to the engine, after making room for it, and count the request that uses it.

        If the engine cannot be given the blend, the likeliest expert answers a routed request.
        """
        blend = answer.mixture
        async with self._lock:
            is_new = blend not in self._blends
            try:
                if is_new:
                    await self._make_room()
                    # The blend counts while the engine loads it: a request that is cancelled then leaves a
                    # blend that can be removed.
                    self._blends[blend] = 0
                await self._add(blend)
            except RequestError:
                if is_new:
                    self._blends.pop(blend, None)
                if not routed:
                    raise
                return await self._likeliest(answer)
            self._blends[blend] += 1
            self._blends.move_to_end(blend)
            return answer

    async def _make_room(self) -> None:
        """Remove least recently used blends until one more may be alive."""
        while len(self._blends) >= self.settings.blends:
            idle = next((blend for blend, users in self._blends.items() if not users), None)
            if idle is None:
                raise RequestError(
                    f"{len(self._blends)} blends are in use, and at most {self.settings.blends} may be "
                    "alive (MEDIATOR_BLENDS): try again later, or name one expert",
                    429,
                    "RateLimitError",
                    "model",
                )
            del self._blends[idle]
            with _unavailable():
                await self._adapters.remove(idle)

    async def _likeliest(self, answer: Resolved) -> Resolved:
        """Give the likeliest expert of a blend to the engine, to answer in the blend's place."""
        name = max(answer.mixture.weights, key=lambda pair: pair[1])[0]
        alone = Mixture.of(name, self.experts)
        await self._add(alone)
        return Resolved(name, alone, answer.figures)


@contextmanager
def _unavailable() -> Iterator[None]:
    """Turn an engine's failure into a refusal of the request."""
    try:
        yield
    except MediatorError as error:
        raise RequestError(str(error), 503, "ServiceUnavailableError", "model") from error
