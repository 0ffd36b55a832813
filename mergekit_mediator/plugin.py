"""The one seam with mergekit: registers the merge methods and takes over `run_merge` for `mediator`."""

import functools
from types import ModuleType
from typing import Annotated, Any

import click
import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field

from mergekit_mediator.config import METHOD
from mergekit_mediator.errors import ConfigError, MediatorError

REFERENCE = "https://arxiv.org/abs/2502.04411"
_SHARE = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)
_SCALE = ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0)
_DENSITY = ParameterSpec(
    "density", Annotated[float, Field(gt=0, le=1)], ParameterScope.NON_BASE, default=0.1
)


class DenseMethod(GroupMergeMethod):  # type: ignore[misc]
    """`mediator_dense`: θ_0 + λ·Σ_t w_t τ_t / Σ_t w_t, the dense expert of averaged layers alone."""

    spec = MergeMethodSpec(
        name="mediator_dense",
        pretty_name="Mediator (dense expert)",
        reference_url=REFERENCE,
        parameters=(_SHARE, _SCALE),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        from mergekit_mediator.dense import average

        shares = [parameters["weight"][entry.id] for entry in group.non_base]
        if sum(shares) <= 0:
            raise ConfigError("weight: the sum over all experts must be above 0")
        base = group.base.tensor
        experts = [entry.tensor for entry in group.non_base]
        return average(base, experts, shares, parameters["lambda"], base.dtype, str(base.device))


class MediatorMethod(GroupMergeMethod):  # type: ignore[misc]
    """`mediator`: known by name, so that mergekit resolves its per-weight parameters.

    A method sees one tensor at a time and returns one tensor, while an artifact needs all layers and
    more files than one: so it is `run_merge` that does the work.
    """

    spec = MergeMethodSpec(
        name=METHOD,
        pretty_name="Mediator",
        reference_url=REFERENCE,
        parameters=(_SHARE, _SCALE, _DENSITY),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        raise ConfigError(
            "merge_method mediator writes an artifact and cannot merge tensors in memory: "
            "use mediator_dense, or mergekit.merge.run_merge"
        )


def register_methods(merge_methods: ModuleType) -> None:
    """Register both methods, once, with the module `mergekit.merge_methods`."""
    registered = {method.spec.name for method in merge_methods.registered_methods()}
    for method in (MediatorMethod(), DenseMethod()):
        if method.spec.name not in registered:
            merge_methods.register(method)


def take_over_run_merge(merge: Any) -> None:
    """Let `run_merge` of the module `mergekit.merge` hand `merge_method: mediator` to this package, and nothing else."""
    stock = merge.run_merge
    if getattr(stock, "handles_mediator", False):
        return

    @functools.wraps(stock)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        if merge_config.merge_method != METHOD:
            stock(merge_config, out_path, options=options, config_source=config_source)
            return
        from mergekit_mediator.merge import run

        try:
            run(merge_config, out_path, options, config_source)
        except MediatorError as error:
            # on a command line one readable line, unless a traceback was asked for with -v
            if click.get_current_context(silent=True) is None or options.verbosity:
                raise
            raise click.ClickException(str(error)) from error

    run_merge.handles_mediator = True  # type: ignore[attr-defined]
    merge.run_merge = run_merge


def install() -> None:
    """Import mergekit and install both hooks, without relying on the start-up hook."""
    import mergekit.merge
    import mergekit.merge_methods

    register_methods(mergekit.merge_methods)
    take_over_run_merge(mergekit.merge)
