"""Merge methods that store experts, as the benchmarks of methods try them: those of the literature, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts import DTYPE

from mergekit_mediator import MediatorModel
from mergekit_mediator.evaluate.rivals import Rivals


@dataclass(frozen=True)
class StoredMethod:
    """A merge method with one choice of parameters: more bytes keep more, so none is chosen."""

    method: str
    parameters: Mapping[str, Any]
    needs_prompts: bool = False


STORED = {
    **{f"twin_merging {r}": StoredMethod("twin_merging", {"rank": r}) for r in (4, 16)},
    **{f"reversible {r}": StoredMethod("reversible", {"rank": r}) for r in (16, 64)},
    **{
        f"mediator random_sign {d}": StoredMethod(
            "mediator", {"values": "random_sign", "density": d}
        )
        for d in (0.03, 0.1)
    },
    **{
        f"mediator random_sign {key} {rate}": StoredMethod(
            "mediator", {"values": "random_sign", key: rate}
        )
        for key, rate in (("keep", 0.99), ("keep", 0.9), ("budget", "1.02x"))
    },
    "mediator keep 0.99": StoredMethod("mediator", {"keep": 0.99}),
    "mediator 1.06x": StoredMethod("mediator", {"budget": "1.06x"}),
    "mediator 1.06x, prompts": StoredMethod("mediator", {"budget": "1.06x"}, needs_prompts=True),
    "mediator 1.06x, prompts, regmean_pp": StoredMethod(
        "mediator", {"budget": "1.06x", "reference": "regmean_pp"}, needs_prompts=True
    ),
}


def stored(
    made: Rivals, name: str, prompts: Mapping[str, Path]
) -> tuple[MediatorModel, dict[str, Any]]:
    """The artifact of all experts by a method of STORED, scored in float32, and what it took."""
    how = STORED[name]
    models = [
        {
            "model": place,
            "parameters": {
                "expert": expert,
                **({"prompts": str(prompts[expert])} if how.needs_prompts else {}),
            },
        }
        for expert, place in made.experts.items()
    ]
    config = {
        "merge_method": how.method,
        "base_model": made.base,
        "models": models,
        "parameters": dict(how.parameters),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    folder, seconds = made.merged(config, name.replace(" ", "-").replace(",", ""))
    figures = {
        "coefficients": " ".join(f"{key} {value}" for key, value in how.parameters.items()),
        "tried": 1,
        "merge_cpu_seconds": round(seconds, 1),
        "bytes_over_base": bytes_over_base(folder, Path(made.base)),
    }
    return MediatorModel.from_pretrained(folder, dtype=DTYPE), figures


def bytes_over_base(folder: Path, base: Path) -> float:
    """The bytes of all weights of an artifact over those of the base."""
    whole, one = (sum(f.stat().st_size for f in d.rglob("*.safetensors")) for d in (folder, base))
    return round(whole / one, 3)
