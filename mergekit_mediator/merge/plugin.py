"""The seam with mergekit: register the merge methods, and take over `run_merge` for `mediator`."""

import contextlib
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from mergekit_mediator.errors import MediatorError
from mergekit_mediator.merge.low_rank_methods import ARTIFACTS, as_mediator
from mergekit_mediator.merge.task_vectors import checking_and_measuring
from mergekit_mediator.methods.data_free import DATA_FREE
from mergekit_mediator.methods.lora_lego import METHOD as LORA_LEGO
from mergekit_mediator.methods.mediator import Mediator
from mergekit_mediator.methods.mediator_dense import MediatorDense
from mergekit_mediator.methods.with_prompts import WITH_PROMPTS

_METHODS: tuple[type[Any], ...] = (Mediator, MediatorDense, *DATA_FREE, *WITH_PROMPTS)


def register_methods(merge_methods: ModuleType) -> None:
    """Register the methods that the module `mergekit.merge_methods` does not have yet."""
    registered = {method.spec.name for method in merge_methods.registered_methods()}
    for method in (kind() for kind in _METHODS):
        if method.spec.name not in registered:
            merge_methods.register(method)


def take_over_run_merge(merge: Any) -> None:
    """Let `run_merge` of the module `mergekit.merge` hand `merge_method: mediator` to this package.

    `twin_merging`, `reversible` and `lora_lego` are handed over, too. mergekit's planner leaves rounding to `mediator_dense`, and
    checks and measures for this package's other methods. mergekit's own methods work as before.
    """
    stock = merge.run_merge
    if getattr(stock, "handles_mediator", False):
        return
    own = {kind.spec.name for kind in _METHODS}
    merge.MergePlanner = checking_and_measuring(_without_rounding(merge.MergePlanner))

    @functools.wraps(stock)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        existed = Path(out_path).exists()
        try:
            if merge_config.merge_method in ARTIFACTS:
                from mergekit_mediator.merge.run import run

                run(as_mediator(merge_config), out_path, options, config_source)
            elif merge_config.merge_method == LORA_LEGO:
                from mergekit_mediator.merge.adapters.lora_lego import run as run_lora_lego

                run_lora_lego(merge_config, out_path)
            elif merge_config.merge_method in own:
                from mergekit_mediator.merge.adapters.loader import adapters_by_weight

                with adapters_by_weight(merge_config.referenced_models(), options) as settings:
                    stock(merge_config, out_path, options=settings, config_source=config_source)
            else:
                stock(merge_config, out_path, options=options, config_source=config_source)
        except MediatorError as error:
            if not existed:
                # a directory that holds shards already stays, as other methods leave it
                with contextlib.suppress(OSError):
                    Path(out_path).rmdir()
            # a command shows one readable line, or with -v a traceback
            if click.get_current_context(silent=True) is None or options.verbosity:
                raise
            raise click.ClickException(str(error)) from error

    run_merge.handles_mediator = True  # type: ignore[attr-defined]
    merge.run_merge = run_merge


def _without_rounding(stock: Any) -> Any:
    """Derive a planner that leaves the rounding of inputs and results to `mediator_dense`.

    mergekit itself rounds inputs to `dtype` when it reads them and results to `out_dtype` when it writes them.
    It would not notice that a finite number becomes infinite.
    """

    class Planner(stock):  # type: ignore[misc]
        def plan_tensor(self, weight: Any, *args: Any, **kwargs: Any) -> None:
            if self.config.merge_method != MediatorDense.spec.name:
                super().plan_tensor(weight, *args, **kwargs)
                return
            count, dtype = len(self._tensors), self.config.dtype
            aligned = self._tokenizer_task is not None and weight.vocabulary_axis is not None
            # the row of a new token is the mean of other rows, which a wide dtype makes more exact
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
            for index, (info, task) in enumerate(self._tensors[count:], start=count):
                self._tensors[index] = info, task.model_copy(update=rounding)

    return Planner


def install() -> None:
    """Import mergekit, register the methods and take over `run_merge`, without the start-up hook."""
    import mergekit.merge
    import mergekit.merge_methods

    register_methods(mergekit.merge_methods)
    take_over_run_merge(mergekit.merge)
