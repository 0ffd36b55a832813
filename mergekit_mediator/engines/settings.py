"""The settings of a service. They come from the environment, because engines have no options for plugins."""

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
    """Return the default folder for adapters."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mergekit-mediator"


class ServiceSettings(BaseModel):
    """The settings by which a service routes requests and names mixtures.

    Attributes:
        artifact: the artifact's directory or repository, if the engine serves another model, such as the one
            that `export --bake-mean` writes; None is the engine's model.
        router: the router's name; `auto` is `embedding` if the artifact is calibrated for it, and else the
            best router that the artifact has.
        policy: see `serve.settings.Settings`, as for the next five.
        entropy_threshold: see there.
        ood_threshold: see there.
        ood_action: see there.
        fallback: see there.
        route_on: see there.
        grid: the weights of blends are multiples of 1/grid, so that requests share blends.
        blends: the most blends that are alive at once; 0 allows no blend, and the likeliest expert answers.
        say: the places of a response that tell the decision: `header`, `body`, both or none.
        cache: the folder for exported adapters.
        rank: the rank of exported adapters; None or `auto` is the largest rank that the engine allows. The engine
            pads every adapter to that, so a smaller one saves no memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: str | None = None
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

    @field_validator("rank", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ServiceSettings":
        """Read `MEDIATOR_ROUTER`, `MEDIATOR_POLICY` and so on.

        Raises:
            SettingError: there is no such setting, or its value is not allowed.
        """
        values = {
            name.removeprefix(_PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(_PREFIX)
        }
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = _PREFIX + str(first["loc"][0]).upper()
            if first["type"] == "extra_forbidden":
                names = ", ".join(_PREFIX + field.upper() for field in cls.model_fields)
                raise SettingError(
                    f"{name}: there is no such setting: the settings are {names}"
                ) from error
            raise SettingError(f"{name}: {first['msg']}, got {first['input']!r}") from error
        settings.answering()  # refuses a wrong value at the start, before the first request
        return settings

    def answering(self) -> Settings:
        """Return the settings that turn a routing decision into a mixture.

        Raises:
            SettingError: a value is not allowed.
        """
        settings = Settings()
        for name in ("policy", "entropy_threshold", "ood_threshold", "ood_action", "fallback"):
            setattr(settings, name, getattr(self, name))
        settings.route_on = self.route_on  # type: ignore[assignment]
        return settings
