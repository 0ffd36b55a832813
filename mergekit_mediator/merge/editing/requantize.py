"""Store the experts of an artifact in fewer bytes, from their stored form alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.tradeoff import slope_for, tradeoff
from mergekit_mediator.delta.value_forms import Values
from mergekit_mediator.errors import EditError
from mergekit_mediator.merge.editing.workspace import Edited, Workspace, change, editing
from mergekit_mediator.merge.workers import Workers, workers
from mergekit_mediator.store.codec import encode_bytes
from mergekit_mediator.store.description import Description
from mergekit_mediator.store.expert_file import ExpertWriter
from mergekit_mediator.store.manifest import Change

# From the most bytes to the fewest.
_VALUES = ("exact", "int8", "int4", "sign")
# Encodes the change of a weight, which has the second name and the third stored form.
_Encode = Callable[[Tensor, str, StoredWeight], StoredWeight]


def requantize(
    out: Path,
    *,
    bits: float | None = None,
    values: Values | None = None,
    experts: Sequence[str] = (),
) -> Edited:
    """Decode stored experts and encode them again in fewer bytes. The dense expert stays as it is.

    Args:
        out: the artifact's directory.
        bits: bits per parameter of the routed weights, for experts that are stored relative to the base.
        values: the form of the values, for experts that are stored by `density`. Give this or `bits`.
        experts: the names of the experts; all by default.

    Returns:
        The manifest of the changed artifact, and a change for each expert. Its details have the bytes before and
        after, and `error`: the root of the squared error over the squared norm, relative to what was stored.

    Raises:
        EditError: an expert is unknown or takes no more than is asked for, or its form is of the other kind.
        ConfigError: fewer bits are asked for than the smallest form takes.
        ArtifactError: the artifact does not verify.
        OutputError: the artifact cannot be written. After any error it is as before.
    """
    with editing(out) as work, workers() as threads:
        chosen = [work.entry(name) for name in dict.fromkeys(experts or work.manifest.expert_names)]
        parameters, changes = dict(work.manifest.parameters), []
        for entry in chosen:
            name = entry.name
            _refuse_signs(work, name)
            if values is not None:
                _check_values(work, name, values)
                result = _write(work, threads, name, _in_form(work, values))
                asked: dict[str, Any] = {"values": values}
            else:
                slope = _slope(work, threads, name, bits or 0.0)
                result = _write(work, threads, name, _at_slope(work, slope))
                asked = {"bits": bits}
                if "slopes" in parameters:
                    parameters["slopes"] = {**parameters["slopes"], name: slope}
            changes.append(_change(name, result, **asked))
        names = {entry.name for entry in chosen}
        if "kept" in parameters:  # what is kept now has not been predicted
            kept = parameters["kept"]
            parameters["kept"] = {name: part for name, part in kept.items() if name not in names}
        manifest = work.manifest.model_copy(
            update={
                "parameters": parameters,
                "experts": tuple(
                    # the figures of the tuning are those of the form that it tuned
                    e.model_copy(update={"tuned": None}) if e.name in names else e
                    for e in work.manifest.experts
                ),
            }
        )
        return work.publish(manifest, *changes)


class _Result(NamedTuple):
    """The bytes of an expert's file before and after, and the error relative to what was stored."""

    before: int
    after: int
    error: float


def _change(name: str, result: _Result, **asked: Any) -> Change:
    note = (
        f"expert {name} was requantized from {result.before:,} to {result.after:,} bytes: it differs by "
        f"{100 * result.error:.1f}% (root mean square) from what was stored"
    )
    return change("requantize", name, note, **asked, **result._asdict())


def _refuse_signs(work: Workspace, name: str) -> None:
    """Refuse an expert of random signs: a smaller form would hold their noise, most of their squared change.

    Raises:
        EditError: see above.
    """
    for weight, d in work.files[name].weights.items():
        if d.values == "random_sign":
            raise EditError(
                f"expert {name!r}: {weight} is stored as random signs, whose noise a smaller form would keep: merge again "
                "with fewer `bits`"
            )


def _check_values(work: Workspace, name: str, values: Values) -> None:
    """Refuse a form that is not smaller than the present one, or of the other kind.

    Raises:
        EditError: see above.
    """
    for weight, d in work.files[name].weights.items():
        where = f"expert {name!r}: {weight}"
        if d.values not in _VALUES or d.factors:
            raise EditError(
                f"{where} is stored as low rank plus sparse, which has no `values`: give --bits instead"
            )
        if _VALUES.index(d.values) >= _VALUES.index(values):
            raise EditError(
                f"{where} has {d.values} values: a smaller form than that required, got {values}: choose "
                "another, or merge again"
            )


def _in_form(work: Workspace, values: Values) -> _Encode:
    """An encoder of the coordinates that an expert stores, with quantised values."""

    def encode_change(difference: Tensor, weight: str, stored: StoredWeight) -> StoredWeight:
        dense = work.dense.weight(weight).to(torch.float32)
        smaller = encode(dense + difference, dense, 1.0, values)
        return replace(smaller, dtype=stored.dtype)

    return encode_change


def _slope(work: Workspace, threads: Workers, name: str, bits: float) -> float:
    """Find the slope at which an expert takes these bits per parameter of the routed weights.

    Raises:
        EditError: the expert is stored relative to the dense expert, or takes no more bits now.
        ConfigError: the smallest form takes more.
    """
    if not work.is_relative_to_base:
        raise EditError(
            f"expert {name!r} is stored relative to the dense expert, and bits are for experts relative to the "
            "base: give --values int8, int4 or sign instead, or merge again with `bits`"
        )
    present = work.bits_per_parameter(name)
    if not 0 < bits < present:
        raise EditError(
            f"expert {name!r}: --bits above 0 and below {present:.3g} required, which it takes now, got "
            f"{bits:g}: lower it, or merge again"
        )

    def costs(weight: str) -> Tensor:
        return tradeoff(_difference(work, name, weight)[0])[0]

    total = sum(threads(costs, work.files[name].weights), torch.zeros(()))
    return slope_for(total, work.routed_parameters, bits)


def _at_slope(work: Workspace, slope: float) -> _Encode:
    """An encoder of low rank plus sparse."""

    def encode_change(difference: Tensor, weight: str, stored: StoredWeight) -> StoredWeight:
        return approximate(difference, slope, stored.dtype, stored.share)

    return encode_change


def _difference(work: Workspace, name: str, weight: str) -> tuple[Tensor, StoredWeight]:
    """The change that an expert stores of a weight, float32, and its stored form."""
    dense = work.dense.weight(weight)
    stored = work.files[name].read(weight, dense)
    return stored.change(dense), stored


def _write(work: Workspace, threads: Workers, name: str, encode_change: _Encode) -> _Result:
    """Encode an expert again and replace its file.

    Raises:
        EditError: the new file is not smaller.
    """

    def encoded(weight: str) -> tuple[str, tuple[Tensor, Description], float, float]:
        difference, stored = _difference(work, name, weight)
        smaller = encode_change(difference, weight, stored)
        error = smaller.change(work.dense.weight(weight)).sub_(difference)
        squares = float(error.double().square().sum()), float(difference.double().square().sum())
        return weight, encode_bytes(smaller), *squares

    path = work.path(work.entry(name))
    before, lost, whole = path.stat().st_size, 0.0, 0.0
    path.unlink()
    writer = ExpertWriter(path, name)
    try:
        for weight, stored, error, norm in threads(encoded, work.files[name].weights):
            writer.append(weight, *stored)
            lost, whole = lost + error, whole + norm
        writer.close()
    finally:
        writer.abandon()
    after = path.stat().st_size
    if after >= before:
        raise EditError(
            f"expert {name!r}: takes {before:,} bytes now and would take {after:,}: ask for less, or leave it"
        )
    return _Result(before, after, math.sqrt(lost / whole) if whole else 0.0)
