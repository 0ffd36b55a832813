"""`merge_method: lora_lego`: LoRA adapters of one base model become one adapter, as PEFT reads it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
from pydantic import Field

from mergekit_mediator.delta.factors import Factors
from mergekit_mediator.errors import ConfigError, InputError
from mergekit_mediator.merge.adapters.config import adapter_directory
from mergekit_mediator.merge.adapters.lora import read_adapter, write_adapter
from mergekit_mediator.merge.method_parameters import check_parameters
from mergekit_mediator.merge.parameters import scalar, sources
from mergekit_mediator.methods.lora_lego import METHOD, merge_factors

_SPEC = MergeMethodSpec(
    name=METHOD,
    parameters=(
        ParameterSpec("rank", Annotated[int, Field(ge=1)], ParameterScope.SHARED, default=None),
        ParameterSpec(
            "lambda", Annotated[float, Field(allow_inf_nan=False)], ParameterScope.SHARED, default=1
        ),
    ),
)


def run(config: MergeConfiguration, out_path: str) -> None:
    """Merge adapters as configured and write one.

    Args:
        config: with `merge_method: lora_lego`.
        out_path: the directory to write to.

    Raises:
        ConfigError: an unknown parameter, no base model, a model that is no adapter of it, or a rank beyond all.
        InputError: an adapter is no plain one, or not of the rank of the others.
            Or a finite number of the result is infinite in the dtype to write.
        OutputError: the directory cannot be written.
    """
    check_parameters(config, _SPEC)
    settings = {
        name: scalar(s, f"parameters: {name}") for name, s in (config.parameters or {}).items()
    }
    adapters = {model: _read(model, config.base_model) for model, _ in sources(config)}
    common = _common_rank(adapters)
    rank = int(settings.get("rank", common))
    if rank > common * len(adapters):
        raise ConfigError(
            f"parameters: rank: at most {common * len(adapters)} required, that of all adapters together, got {rank}"
        )
    names = sorted({name for factors in adapters.values() for name in factors})
    merged = {}
    for name in names:
        own = [factors[name] for factors in adapters.values() if name in factors]
        merged[name] = merge_factors(
            own, min(rank, common * len(own)), float(settings.get("lambda", 1.0))
        )
    stored = [f.left.dtype for factors in adapters.values() for f in factors.values()]
    widest = functools.reduce(torch.promote_types, stored)
    dtype = dtype_from_name(config.out_dtype or config.dtype) or widest
    write_adapter(Path(out_path), str(config.base_model), merged, dtype)


def _read(model: ModelReference, base: ModelReference) -> dict[str, Factors]:
    if model.lora is None or model.model != base.model:
        raise ConfigError(
            f"model {model}: an adapter of the base model required: write `{base}+ADAPTER`"
        )
    factors = read_adapter(adapter_directory(model))
    if not factors:
        raise InputError(
            f"model {model}: a plain LoRA adapter required, with factors for matrices alone (no DoRA, biases, "
            "embeddings, nor modules saved whole): merge the full models instead"
        )
    return factors


def _common_rank(adapters: Mapping[ModelReference, Mapping[str, Factors]]) -> int:
    """The rank that all adapters have everywhere."""
    if len(adapters) < 2:
        raise ConfigError(f"models: at least two adapters required, got {len(adapters)}")
    ranks = {
        (f.rank, model, name) for model, factors in adapters.items() for name, f in factors.items()
    }
    low = min(ranks, key=lambda found: found[0])
    high = max(ranks, key=lambda found: found[0])
    if low[0] != high[0]:
        raise InputError(
            f"{low[2]}: adapters of one rank required, got {low[0]} in {low[1]} and {high[0]} in {high[1]}"
        )
    return low[0]
