"""Which mixture each row of a batch gets: as its cache has it, as it is named, or as it is routed."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_mediator.errors import MixtureError, RoutingError
from mergekit_mediator.models.contexts import Contexts, RouteOn
from mergekit_mediator.route.decision import RoutingDecision, apply_policy
from mergekit_mediator.serve import caches
from mergekit_mediator.serve.mixer import Mixer
from mergekit_mediator.serve.mixture import DENSE_NAME, Mixture, Named
from mergekit_mediator.serve.routers import Router, Routers
from mergekit_mediator.serve.settings import Settings

_UNCALIBRATED_ENTROPY = 0.5


def mixtures_of(
    decision: RoutingDecision,
    settings: Settings,
    thresholds: tuple[float | None, float | None],
    experts: Sequence[str],
) -> Tensor:
    """The mixtures that a decision leads to, `[batch, n_experts]` float32.

    Args:
        decision: of a router.
        settings: the policy, the action, and thresholds instead of the router's own.
        thresholds: the router's own, of normalised entropy and of the out-of-distribution score, if any.
        experts: the artifact's.

    Raises:
        RoutingError: see `decision.apply_policy`; or an action for what is out of distribution where the
            router cannot tell what is.
    """
    entropy, ood = thresholds
    entropy = _UNCALIBRATED_ENTROPY if entropy is None else entropy
    if settings.entropy_threshold is not None:
        entropy = settings.entropy_threshold
    if settings.ood_threshold is not None:
        ood = settings.ood_threshold
    action, fallback = settings.ood_action, settings.fallback
    if ood is None and action != "blend":
        raise RoutingError(
            f"ood_action {action!r} needs a router that knows what is out of distribution: run "
            "`mergekit-mediator calibrate`, or set ood_threshold"
        )
    if action == "fallback" and fallback == DENSE_NAME and fallback not in experts:
        action = "dense"
    return apply_policy(
        decision,
        settings.policy,
        entropy,
        ood_threshold=ood,
        ood_action=action,
        fallback=fallback,
    )


class Choice:
    """Chooses the mixtures of requests."""

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
        """Which experts each row `[batch, length]` needs; see `MediatorModel.route`.

        Raises:
            RoutingError: a row without any text.
            MixtureError: a mixture is in place.
        """
        if not bool(mask.any(dim=1).all()):
            raise RoutingError("an empty prompt cannot be routed: give it text, or name a mixture")
        if self._mixer.inside:
            raise MixtureError("routing needs the dense expert: leave the mixture first")
        counted = self._contexts.counted(ids, mask, route_on or self._settings.route_on)
        with self._mixer.lock:
            return self._routers.decide(ids, mask, counted, router, temperature)

    def weights(self, decision: RoutingDecision, router: Router | None = None) -> Tensor:
        """The mixtures that a decision leads to, `[batch, n_experts]` float32.

        Raises:
            RoutingError: see `mixtures_of`.
        """
        thresholds = self._routers.thresholds(router)
        return mixtures_of(decision, self._settings, thresholds, self._mixer.names)

    def named(self, mixture: Named) -> Mixture:
        """The mixture that a name or weights stand for.

        Raises:
            MixtureError: see `Mixture.of`.
        """
        return Mixture.of(mixture, self._mixer.names)

    def mixtures(
        self,
        ids: Tensor | None,
        context: Tensor,
        wanted: Named | Sequence[Named | None] | None,
        cache: object,
        route_on: RouteOn | None,
    ) -> tuple[Mixture, ...]:
        """The mixture of each row.

        Args:
            ids: `[batch, length]`; not looked at where nothing has to be routed.
            context: `[batch, length]`, 1 for the tokens to route by.
            wanted: one for all rows or one for each; None in the place of a row routes it.
            cache: keys and values of earlier tokens, or None.
            route_on: instead of the setting.

        Raises:
            MixtureError: an unknown expert, another number of mixtures than rows, or a cache that was
                filled under another mixture than is wanted.
            RoutingError: a row that must be routed and cannot be.
        """
        batch = len(context)
        rows: list[Mixture | None] = [None] * batch
        if wanted is not None:
            each: list[Any] = [wanted] * batch
            if isinstance(wanted, Sequence | Tensor) and not isinstance(wanted, str):
                each = list(wanted)
            if len(each) != batch:
                raise MixtureError(f"mixture: {batch} rows, but {len(each)} mixtures are given")
            rows = [None if name is None else self.named(name) for name in each]
        if caches.is_filled(cache):
            known = caches.rows_of(cache)
            known = known * batch if len(known) == 1 else known
            found = tuple(r if r is not None else k for r, k in zip(rows, known, strict=False))
            caches.check(cache, caches.joined(found))
            return found
        if self._settings.fallback is not None:
            fallback = self.named(self._settings.fallback)
            empty = (~context.bool().any(dim=1)).tolist()
            rows = [
                fallback if is_empty and row is None else row
                for is_empty, row in zip(empty, rows, strict=True)
            ]
        asked = [place for place, row in enumerate(rows) if row is None]
        if asked:
            if ids is None:
                raise RoutingError("inputs_embeds cannot be routed: give input_ids, or a mixture")
            decision = self.decide(ids[asked], context[asked], route_on=route_on)
            for place, values in zip(asked, self.weights(decision).tolist(), strict=True):
                rows[place] = Mixture.of_row(values, self._mixer.names)
        return tuple(row for row in rows if row is not None)
