"""The settings of a routed model, checked at every assignment."""

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_mediator.errors import SettingError
from mergekit_mediator.models.contexts import RouteOn
from mergekit_mediator.route.decision import OodAction, Policy
from mergekit_mediator.serve.batch_forms import Apply


class Settings(BaseModel):
    """The settings of a routed model; users may change them between requests.

    Attributes:
        policy: the way from probabilities to a mixture; see `decision.apply_policy`.
        entropy_threshold: the normalised entropy, a fraction of log(number of experts), above which the
            policy `auto` blends experts; None is the calibrated threshold, or 0.5 without calibration.
        ood_threshold: the score above which a request is out of distribution; None is the calibrated
            threshold.
        ood_action: the action for requests that are out of distribution; see `decision.apply_policy`.
        fallback: an expert's name or `dense`. It answers requests that have no text to route by, and with
            the action `fallback` those that are out of distribution. None refuses requests without text.
        route_on: the text that routing reads: the whole `prompt`, or the `last_user` turn of a chat.
        apply: the form of a batch. `merge` puts a mixture into the weights; rows that need different
            mixtures run one mixture after the other. `rows` gives every row its mixture without a change
            of the weights (see `rows`). `auto` is `rows` for rows that differ, if the model's layers allow
            it, and for experts that are factors alone, if few tokens are computed; else it is `merge`.
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
            SettingError: there is no such setting, or the value is not allowed.
        """
        if name not in type(self).model_fields:
            raise unknown_setting(name)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise SettingError(f"{name}: {reason[0].lower()}{reason[1:]}, got {value!r}") from error


class SettingAttribute:
    """An attribute of an object that reads and writes the setting of the same name in `settings`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        return getattr(owner.settings, self._name)

    def __set__(self, owner: Any, value: Any) -> None:
        setattr(owner.settings, self._name, value)


class SettingAttributes:
    """An object whose settings are its attributes too; a misspelt setting is an error.

    Attributes:
        settings: the settings.
    """

    # The names of public attributes that are no settings.
    _plain_attributes: ClassVar[frozenset[str]] = frozenset({"settings"})
    settings: Settings

    policy = SettingAttribute()
    entropy_threshold = SettingAttribute()
    ood_threshold = SettingAttribute()
    ood_action = SettingAttribute()
    fallback = SettingAttribute()
    route_on = SettingAttribute()
    apply = SettingAttribute()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            SettingError: there is no setting and no attribute of this name.
        """
        public = name in Settings.model_fields or name in self._plain_attributes
        if not (public or name.startswith("_")):
            raise unknown_setting(name)
        super().__setattr__(name, value)


def unknown_setting(name: str) -> SettingError:
    """Make the error for a name that is no setting; it suggests the nearest setting."""
    names = list(Settings.model_fields)
    matches = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {matches[0]!r}?" if matches else f"the settings are {', '.join(names)}"
    return SettingError(f"unknown setting {name!r}: {hint}")
