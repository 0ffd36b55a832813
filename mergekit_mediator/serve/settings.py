"""How a routed model answers requests: its settings, checked whenever one is set."""

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_mediator.errors import SettingError
from mergekit_mediator.models.contexts import RouteOn
from mergekit_mediator.route.decision import OodAction, Policy
from mergekit_mediator.serve.batch_forms import Apply


class Settings(BaseModel):
    """The settings of a routed model; they may be changed between requests.

    Attributes:
        policy: how probabilities become a mixture; see `decision.apply_policy`.
        entropy_threshold: of the policy `auto`, as a fraction of log(number of experts); None is the
            calibrated one, or 0.5 without calibration.
        ood_threshold: requests beyond it count as out of distribution; None is the calibrated one.
        ood_action: what is done with a request that is out of distribution; see `decision.apply_policy`.
        fallback: what answers a request that has no text to route by, and with the action `fallback` one
            that is out of distribution: an expert's name or `dense`. None refuses the former.
        route_on: what routing looks at: the whole `prompt`, or the `last_user` turn of a chat.
        apply: `merge` puts a mixture into the weights, and rows that need different ones are run one
            mixture after the other; `rows` gives every row its own without touching the weights (see
            `rows`); `auto` is `rows` for rows that differ, where the model's layers allow it, and
            where experts are factors alone and few tokens are computed; else `merge`.
    """

    model_config = ConfigDict(validate_assignment=True, extra="forbid")

    policy: Policy = "auto"
    entropy_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    ood_threshold: float | None = None
    ood_action: OodAction = "blend"
    fallback: str | None = None
    route_on: RouteOn = "prompt"
    apply: Apply = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        """Set one setting.

        Raises:
            SettingError: there is no such setting, or it cannot have this value.
        """
        if name not in type(self).model_fields:
            raise unknown_setting(name)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise SettingError(f"{name}: {reason[0].lower()}{reason[1:]}, got {value!r}") from error


class SettingAttribute:
    """An attribute of an object with `settings` that is one of them."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        return getattr(owner.settings, self._name)

    def __set__(self, owner: Any, value: Any) -> None:
        setattr(owner.settings, self._name, value)


def unknown_setting(name: str) -> SettingError:
    """The error for a name that is no setting."""
    known = list(Settings.model_fields)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(known)}"
    return SettingError(f"no setting {name!r}: {hint}")
