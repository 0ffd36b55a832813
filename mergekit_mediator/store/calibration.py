"""The figures of a calibrated router in the manifest."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.store.manifest import MANIFEST, Manifest

_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class Calibration(BaseModel):
    """A router on held-out prompts.

    Attributes:
        experts: the names of the experts, in the order of `confusion`.
        prompts: the number of prompts by expert.
        accuracy: the fraction of held-out prompts, 0 to 1, whose likeliest expert is their own.
        ece: the expected calibration error, 0 to 1.
        confusion: the number of held-out prompts by true expert, then by chosen expert.
        reliability: for bins of confidence, the number of prompts, their mean confidence and their accuracy;
            empty if version 0.1.0 calibrated the router.
        ood_auroc: how often the out-of-distribution score of a general request is above that of a held-out prompt,
            0 to 1; None if that was not measured.
        ood_requests: the number of these general requests.
    """

    model_config = ConfigDict(frozen=True)

    experts: list[str]
    prompts: dict[str, _Count]
    accuracy: _Share
    ece: _Share
    confusion: list[list[_Count]]
    reliability: list[tuple[_Count, _Share, _Share]] = []
    ood_auroc: _Share | None = None
    ood_requests: _Count = 0

    @property
    def said_of_ood(self) -> str:
        """Say how well the router knows requests that belong to no expert; an empty text if it was not measured."""
        if self.ood_auroc is None:
            return ""
        return (
            f"Its out-of-distribution score tells these prompts from {self.ood_requests} general requests, which it "
            f"had not seen either, with an AUROC of {self.ood_auroc:.3f}."
        )


def calibration_of(manifest: Manifest) -> Calibration | None:
    """Read the figures of an artifact's calibrated router; None if the router is not calibrated.

    Raises:
        ArtifactError: the figures are damaged.
    """
    if manifest.router is None:
        return None
    try:
        calibration = Calibration.model_validate(manifest.router)
        count = len(calibration.experts)
        if [len(row) for row in calibration.confusion] != [count] * count:
            raise ValueError(f"confusion: {count} rows of {count} numbers required")
    except ValueError as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise ArtifactError(
            f"{MANIFEST}: router: {text}: run `mergekit-mediator calibrate` again"
        ) from error
    return calibration
