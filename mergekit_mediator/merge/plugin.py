"""The one seam with mergekit: registers the merge methods and takes over `run_merge` for `mediator`."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import click
import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field

from mergekit_mediator.errors import ConfigError, MediatorError
from mergekit_mediator.merge.config import METHOD

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

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """mergekit's own, but finite numbers that a dtype makes infinite are refused."""
        from mergekit_mediator.delta.narrow import check_range, narrowed

        results = []
        for group, given, dtype in zip(groups, parameters, input_dtypes, strict=True):
            name = group.metadata.name or "weight"
            for entry in group.entries:
                check_range(entry.tensor, dtype or entry.tensor.dtype, f"{name} of {entry.id}")
            (result,) = super()._execute((group,), [given], options, input_dtypes=[dtype])
            results.append(result if out_dtype is None else narrowed(result, out_dtype, name))
        return tuple(results)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        from mergekit_mediator.methods.weighted_mean import average

        shares = [parameters["weight"][entry.id] for entry in group.non_base]
        if sum(shares) <= 0:
            raise ConfigError("weight: the sum over all experts must be above 0")
        base, name = group.base.tensor, group.metadata.name or "weight"
        experts = [entry.tensor for entry in group.non_base]
        scale, device = parameters["lambda"], str(base.device)
        return average(base, experts, shares, scale, base.dtype, name, device)


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
    """Let `run_merge` of the module `mergekit.merge` hand `merge_method: mediator` to this package, and let
    `mediator_dense` do its own rounding; nothing else changes."""
    stock = merge.run_merge
    if getattr(stock, "handles_mediator", False):
        return
    merge.MergePlanner = _rounding_itself(merge.MergePlanner)

    @functools.wraps(stock)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        present = Path(out_path).exists()
        try:
            if merge_config.merge_method == METHOD:
                from mergekit_mediator.merge.run import run

                run(merge_config, out_path, options, config_source)
            else:
                stock(merge_config, out_path, options=options, config_source=config_source)
        except MediatorError as error:
            if not present:
                with contextlib.suppress(
                    OSError
                ):  # that holds shards already stays, as of other methods
                    Path(out_path).rmdir()
            # on a command line one readable line, unless a traceback was asked for with -v
            if click.get_current_context(silent=True) is None or options.verbosity:
                raise
            raise click.ClickException(str(error)) from error

    run_merge.handles_mediator = True  # type: ignore[attr-defined]
    merge.run_merge = run_merge


def _rounding_itself(stock: Any) -> Any:
    """mergekit's planner, which leaves the rounding of inputs and results to `mediator_dense`.

    mergekit rounds inputs to `dtype` where it reads them and results to `out_dtype` where it writes them,
    where nobody would notice that a finite number became infinite.
    """

    class Planner(stock):  # type: ignore[misc]
        def plan_tensor(self, weight: Any, *args: Any, **kwargs: Any) -> None:
            if self.config.merge_method != DenseMethod.spec.name:
                super().plan_tensor(weight, *args, **kwargs)
                return
            before, dtype = len(self._tensors), self.config.dtype
            aligned = self._tokenizer_task is not None and weight.vocabulary_axis is not None
            # rows of new tokens are means of others, which a wide dtype makes more exact
            keep = aligned and dtype in ("float32", "float64")
            self.config.dtype = dtype if keep else None
            try:
                super().plan_tensor(weight, *args, **kwargs)
            finally:
                self.config.dtype = dtype
            rounding = {
                "dtype": None if keep or weight.force_dtype else dtype,
                "out_dtype": weight.force_dtype or self.config.out_dtype,
            }
            for index, (info, task) in enumerate(self._tensors[before:], start=before):
                self._tensors[index] = info, task.model_copy(update=rounding)

    return Planner


def install() -> None:
    """Import mergekit and install both hooks, without relying on the start-up hook."""
    import mergekit.merge
    import mergekit.merge_methods

    register_methods(mergekit.merge_methods)
    take_over_run_merge(mergekit.merge)
