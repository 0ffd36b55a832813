"""Choose the mixture of each row of a batch: from its cache, by its name, or by routing."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_mediator.errors import MixtureError, RoutingError
from mergekit_mediator.models.contexts import Contexts, RouteOn
from mergekit_mediator.route.decision import RoutingDecision, Thresholds, apply_policy
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import DENSE_NAME, Mixture, Named
from mergekit_mediator.serve.routers import Router, Routers
from mergekit_mediator.serve.settings import Settings

# The normalised entropy above which an uncalibrated router blends experts.
_UNCALIBRATED_ENTROPY = 0.5


def mixtures_of(
    decision: RoutingDecision,
    settings: Settings,
    thresholds: Thresholds,
    experts: Sequence[str],
) -> Tensor:
    """Turn a routing decision into mixtures, `[batch, n_experts]` float32.

    Args:
        decision: the decision of a router.
        settings: the policy, the action, and thresholds that replace those of the router.
        thresholds: those of the router.
        experts: the artifact's experts.

    Raises:
        RoutingError: see `decision.apply_policy`; or the settings have an action for requests that are
            out of distribution, and the router has no threshold for them.
    """
    entropy, ood, unsure = thresholds
    entropy = _UNCALIBRATED_ENTROPY if entropy is None else entropy
    if settings.entropy_threshold is not None:
        entropy = settings.entropy_threshold
    if settings.ood_threshold is not None:
        ood = settings.ood_threshold
    action, fallback = settings.ood_action, settings.fallback
    if ood is None and action != "blend":
        raise RoutingError(
            f"ood_action {action!r} needs a threshold of the out-of-distribution score, and this "
            "router has none: run `mergekit-mediator calibrate`, or set ood_threshold"
        )
    if action == "fallback" and fallback == DENSE_NAME and fallback not in experts:
        action = "dense"
    return apply_policy(
        decision,
        settings.policy,
        entropy,
        unsure=unsure,
        ood_threshold=ood,
        ood_action=action,
        fallback=fallback,
    )


class Choice:
    """Choose the mixtures of requests."""

    def __init__(
        self, settings: Settings, mixer: Mixer, routers: Routers, contexts: Contexts
    ) -> None:
        self._settings, self._mixer = settings, mixer
        self._routers, self._contexts = routers, contexts

    def decide(
        self,
        ids: Tensor,
        mask: Tensor,
        router: Router | None = None,
        temperature: float | None = None,
        route_on: RouteOn | None = None,
    ) -> RoutingDecision:
        """Decide which experts each row `[batch, length]` needs; see `MediatorModel.route`.

        Raises:
            RoutingError: a row has no text.
            MixtureError: a mixture is in place.
        """
        if not bool(mask.any(dim=1).all()):
            raise RoutingError("an empty prompt cannot be routed: give it text, or name a mixture")
        if self._mixer.inside:
            raise MixtureError(
                "routing needs the dense expert, and a mixture is in place: leave the mixture first"
            )
        counted = self._contexts.counted(ids, mask, route_on or self._settings.route_on)
        with self._mixer.turn():
            return self._routers.decide(ids, mask, counted, router, temperature)

    def weights(self, decision: RoutingDecision, router: Router | None = None) -> Tensor:
        """Turn a routing decision into mixtures, `[batch, n_experts]` float32.

        Raises:
            RoutingError: see `mixtures_of`.
        """
        thresholds = self._routers.thresholds(router)
        return mixtures_of(decision, self._settings, thresholds, self._mixer.names)

    def named(self, mixture: Named) -> Mixture:
        """Make the mixture that a name or weights stand for.

        Raises:
            MixtureError: see `Mixture.of`.
        """
        return Mixture.of(mixture, self._mixer.names)

    def mixtures(
        self,
        ids: Tensor | None,
        context: Tensor,
        mixture: Named | Sequence[Named | None] | None,
        cache: object,
        route_on: RouteOn | None,
    ) -> tuple[Mixture, ...]:
        """Choose the mixture of each row.

        Args:
            ids: token ids `[batch, length]`; only rows that are routed need them.
            context: `[batch, length]`, 1 for the tokens to route by.
            mixture: one for all rows, or one for each row; a row whose mixture is None is routed.
            cache: keys and values of earlier tokens, or None.
            route_on: replaces the setting.

        Raises:
            MixtureError: an expert is unknown, there are not as many mixtures as rows, or the cache was
                filled under another mixture.
            RoutingError: a row must be routed and cannot be.
        """
        batch = len(context)
        rows: list[Mixture | None] = [None] * batch
        if mixture is not None:
            names: list[Any] = [mixture] * batch
            if isinstance(mixture, Sequence | Tensor) and not isinstance(mixture, str):
                names = list(mixture)
            if len(names) != batch:
                raise MixtureError(
                    f"mixture: one mixture, or one for each of {batch} rows is required, got "
                    f"{len(names)} mixtures"
                )
            rows = [None if name is None else self.named(name) for name in names]
        if caches.is_filled(cache):
            cached = caches.rows_of(cache)
            cached = cached * batch if len(cached) == 1 else cached
            result = tuple(r if r is not None else c for r, c in zip(rows, cached, strict=False))
            caches.check(cache, caches.joined(result))
            return result
        if self._settings.fallback is not None:
            fallback = self.named(self._settings.fallback)
            empty = (~context.bool().any(dim=1)).tolist()
            rows = [
                fallback if is_empty and row is None else row
                for is_empty, row in zip(empty, rows, strict=True)
            ]
        places = [place for place, row in enumerate(rows) if row is None]
        if places:
            if ids is None:
                raise RoutingError("inputs_embeds cannot be routed: give input_ids, or a mixture")
            decision = self.decide(ids[places], context[places], route_on=route_on)
            for place, values in zip(places, self.weights(decision).tolist(), strict=True):
                rows[place] = Mixture.of_row(values, self._mixer.names)
        return tuple(row for row in rows if row is not None)
