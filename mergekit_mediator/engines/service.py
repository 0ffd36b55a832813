"""Which adapter answers a request: named, blended or routed; and which blends are alive."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
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
    """A request that cannot be answered, as OpenAI's errors are.

    Attributes:
        status: of HTTP.
        kind: OpenAI's type of the error.
        param: the field of the request, if it is one's fault.
    """

    def __init__(self, message: str, status: int, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param

    def body(self) -> dict[str, Any]:
        """The error as an object."""
        fields = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": fields}


@dataclass(frozen=True)
class Resolved:
    """The mixture that answers a request.

    Attributes:
        name: of its adapter.
        mixture: the weights by expert.
        figures: of the decision, if the request was routed: `entropy` in nats and `ood`.
    """

    name: str
    mixture: Mixture
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The decision as a response says it."""
        return {"mixture": dict(self.mixture.weights), **self.figures}


class Adapters(Protocol):
    """Where adapters are put to be used: an engine."""

    async def add(self, mixture: Mixture) -> None:
        """Make a mixture's adapter usable by its name; nothing happens if it is."""
        ...

    async def remove(self, mixture: Mixture) -> None:
        """Take a blend's adapter away."""
        ...

    def engine_name(self, mixture: Mixture) -> str:
        """The name that requests have for a mixture which was added."""
        ...

    @property
    def dense_names(self) -> frozenset[str]:
        """The engine's own names of the dense expert."""
        ...


class Service:
    """Resolves the models that requests name.

    Blends live as long as they are in use, and `settings.blends` of them beyond that: the least recently
    used leave, so no client fills memory by naming them.
    """

    def __init__(
        self,
        experts: tuple[str, ...],
        decider: Decider,
        adapters: Adapters,
        settings: ServiceSettings,
    ) -> None:
        """
        Args:
            experts: of the artifact.
            decider: routes prompts.
            adapters: of the engine.
            settings: of the service.

        Raises:
            MixtureError: the fallback is no expert.
            SettingError: an action for requests out of distribution, and a router that does not know them.
        """
        self.experts, self.settings = experts, settings
        self._decider, self._adapters = decider, adapters
        self._answering = settings.answering()
        self._fallback = (
            None if settings.fallback is None else Mixture.of(settings.fallback, experts)
        )
        knows_far = settings.ood_threshold is not None or decider.thresholds[1] is not None
        if settings.ood_action != "blend" and not knows_far:
            raise SettingError(
                f"MEDIATOR_OOD_ACTION: {settings.ood_action} needs a router that knows what is out of "
                f"distribution, and {decider.name} does not: run `mergekit-mediator calibrate`, or set "
                "MEDIATOR_OOD_THRESHOLD"
            )
        self._blends: OrderedDict[Mixture, int] = OrderedDict()  # with the requests that use each
        self._lock = asyncio.Lock()

    def engine_name(self, answer: "Resolved") -> str:
        """The name that the engine has for a mixture."""
        return self._adapters.engine_name(answer.mixture)

    @asynccontextmanager
    async def resolved(
        self, model: str | None, body: Mapping[str, Any]
    ) -> AsyncIterator[Resolved | None]:
        """The mixture of a request, usable inside the context; None for a model of the engine's own.

        Args:
            model: as the request names it; None or empty is the dense expert, which engines take it for.
            body: of the request, whose prompt is routed for `auto`.

        Raises:
            RequestError: an unknown expert, weights that are no mixture, a request that cannot be routed
                or is refused, more blends at once than may be alive, or an adapter that the engine
                cannot be given.
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
            unknown = "unknown expert" in str(error)
            raise RequestError(
                str(error),
                404 if unknown else 400,
                "NotFoundError" if unknown else "BadRequestError",
                "model",
            ) from error
        return None if mixture is None else Resolved(name_of(mixture), mixture)

    async def _add(self, mixture: Mixture) -> None:
        try:
            await self._adapters.add(mixture)
        except MediatorError as error:
            raise RequestError(str(error), 503, "ServiceUnavailableError", "model") from error

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
        if ood == ood:  # a router without a distance gives NaN
            figures["ood"] = round(ood, 4)
        return Resolved(name_of(mixture), mixture, figures)

    async def _begin(self, answer: Resolved, routed: bool) -> Resolved:
        """Count a request that uses a blend, after making room for the blend.

        A routed request whose blend the engine cannot be given is answered by its likeliest expert.
        """
        async with self._lock:
            try:
                if answer.mixture not in self._blends:
                    await self._make_room()
                await self._add(answer.mixture)
            except RequestError:
                if not routed:
                    raise
                return await self._likeliest(answer)
            self._blends[answer.mixture] = self._blends.get(answer.mixture, 0) + 1
            self._blends.move_to_end(answer.mixture)
            return answer

    async def _make_room(self) -> None:
        """Let the least recently used blends leave, as far as one more needs it."""
        while len(self._blends) >= max(1, self.settings.blends):
            idle = next((blend for blend, users in self._blends.items() if not users), None)
            if idle is None:
                raise RequestError(
                    f"{len(self._blends)} blends are in use, and no more may be alive "
                    "(MEDIATOR_BLENDS): try again later",
                    429,
                    "RateLimitError",
                    "model",
                )
            del self._blends[idle]
            await self._adapters.remove(idle)

    async def _likeliest(self, answer: Resolved) -> Resolved:
        name = max(answer.mixture.weights, key=lambda pair: pair[1])[0]
        alone = Mixture.of(name, self.experts)
        await self._add(alone)
        return Resolved(name, alone, answer.figures)
