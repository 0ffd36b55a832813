"""The settings of a service, from the environment: engines have no options for plugins."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergekit_mediator.errors import SettingError
from mergekit_mediator.serve.settings import Settings

_PREFIX = "MEDIATOR_"
Say = Literal["header", "body"]
RouterName = Literal["auto", "embedding", "hidden", "response", "likelihood"]


def _cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mergekit-mediator"


class ServiceSettings(BaseModel):
    """How a service routes requests and names mixtures.

    Attributes:
        router: `auto` is the best one that needs no second model in memory, or the best one if there is none.
        policy, entropy_threshold, ood_threshold, ood_action, fallback, route_on: see `settings.Settings`.
        grid: weights of blends are multiples of 1/grid, so that requests share them.
        blends: at most so many blends are alive.
        say: where a response says what was decided: `header`, `body`, both or none.
        cache: the folder for exported adapters.
        rank: of exported adapters; None is the largest that the engine takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    router: RouterName = "auto"
    policy: str = "auto"
    entropy_threshold: float | None = None
    ood_threshold: float | None = None
    ood_action: str = "blend"
    fallback: str | None = None
    route_on: str = "prompt"
    grid: Annotated[int, Field(ge=1, le=64)] = 8
    blends: Annotated[int, Field(ge=0)] = 16
    say: tuple[Say, ...] = ("header", "body")
    cache: Path = Field(default_factory=_cache_directory)
    rank: Annotated[int, Field(ge=1)] | None = None

    @field_validator("say", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value == "none" else tuple(part.strip() for part in value.split(","))
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ServiceSettings":
        """Read `MEDIATOR_ROUTER`, `MEDIATOR_POLICY` and so on.

        Raises:
            SettingError: an unknown name, or a value that a setting cannot have.
        """
        given = {
            name.removeprefix(_PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(_PREFIX)
        }
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = _PREFIX + str(first["loc"][0]).upper()
            raise SettingError(f"{name}: {first['msg']}, got {first['input']!r}") from error
        settings.answering()  # refuses at once what it would refuse at the first request
        return settings

    def answering(self) -> Settings:
        """The settings that turn a decision into a mixture.

        Raises:
            SettingError: a value that a setting cannot have.
        """
        settings = Settings()
        for name in ("policy", "entropy_threshold", "ood_threshold", "ood_action", "fallback"):
            setattr(settings, name, getattr(self, name))
        settings.route_on = self.route_on  # type: ignore[assignment]
        return settings
