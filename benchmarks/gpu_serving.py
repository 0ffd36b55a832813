"""Mixtures on the device: entering and leaving, decoding, batches of many experts, experts in host memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_limits import kernels, synchronize
from timing import in_turns, milliseconds, ratio

from mergekit_mediator import MediatorModel
from mergekit_mediator.models.loading import load_plain

PROMPT_TOKENS, ROWS_PER_EXPERT = 24, 2


def seconds(function: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def load(root: Path, device: str, **options: Any) -> MediatorModel:
    """An artifact with its dense expert on the device."""
    model = MediatorModel.from_pretrained(root, verify=False, **options)
    dense: Any = model.model
    dense.to(device)
    return model


def prompts(rows: int, device: str) -> torch.Tensor:
    ids = torch.randint(4, 1000, (rows, PROMPT_TOKENS), generator=torch.Generator().manual_seed(7))
    return ids.to(device)


def greedy(tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}


def entering(
    model: MediatorModel, bandwidth: float, rounds: int, profile: bool = False
) -> dict[str, Any]:
    """Entering and leaving a resident expert, over writing the changed weights once at the copy's bandwidth.

    Args:
        model: on the device.
        bandwidth: bytes per second.
        rounds: of both.
        profile: name the operations of a blend that take most time.
    """
    names, turn = model.experts[:2], iter(range(10**6))
    left: list[float] = []

    def enter() -> float:
        context = model.mixture({names[next(turn) % 2]: 1.0})
        took = seconds(context.__enter__)
        left.append(seconds(lambda: context.__exit__(None, None, None)))
        return took

    first = enter()
    times = in_turns(rounds, enter=enter, leave=lambda: left[-1])
    blend = {name: 1 / len(names) for name in names}

    def both() -> None:
        with model.mixture(blend):
            pass

    blends = [seconds(both) for _ in range(rounds + 1)][1:]
    stored = model._mixer.placer.expert(names[0])
    changed = sum(
        model._mixer.placer.weights[n].nbytes
        for n, s in stored.items()
        if s.positions.numel() or s.factors
    )
    coordinates = sum(s.positions.numel() for s in stored.values())
    floor = changed / bandwidth
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "first_enter_seconds": round(first, 3),
        "changed_bytes": changed,
        "sparse_coordinates": coordinates,
        "floor_ms": round(1e3 * floor, 3),
        "milliseconds": milliseconds(times),
        "enter_over_bandwidth": round(medians["enter"] / floor, 2),
        "leave_over_bandwidth": round(medians["leave"] / floor, 2),
        "blend_of_two_in_and_out_ms": round(1e3 * statistics.median(blends), 3),
        **({"kernels": kernels(both)} if profile else {}),
    }


def decoding(model: MediatorModel, root: Path, device: str, rounds: int, tokens: int) -> Any:
    """Decoding inside a mixture against the plain dense model."""
    plain: Any = load_plain(root)
    plain.to(device)
    ids = prompts(1, device)
    mask = torch.ones_like(ids)

    def dense() -> float:
        return seconds(lambda: plain.generate(ids, attention_mask=mask, **greedy(tokens)))

    def mixed() -> float:
        with model.mixture({model.experts[0]: 1.0}):
            return seconds(lambda: model.generate(ids, mask, **greedy(tokens)))

    times = in_turns(rounds, dense=dense, mixed=mixed)
    return {
        "decode_over_dense": ratio(times, "dense", "mixed"),
        "milliseconds": milliseconds(times),
    }


def batches(model: MediatorModel, device: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Rows of four experts in one batch: in rows form, and one mixture after the other."""
    mixture = [name for name in model.experts[:4] for _ in range(ROWS_PER_EXPERT)]
    ids = prompts(len(mixture), device)
    mask = torch.ones_like(ids)

    def run(apply: Any) -> float:
        options = {"mixture": mixture, "apply": apply, **greedy(tokens)}
        return seconds(lambda: model.generate(ids, mask, **options))

    times = in_turns(
        rounds,
        merge=lambda: run("merge"),
        rows=lambda: run("rows"),
        dense=lambda: seconds(lambda: model.generate(ids, mask, mixture="dense", **greedy(tokens))),
    )
    return {
        "mixed_batch_speedup": ratio(times, "merge", "rows"),
        "rows_over_dense": ratio(times, "rows", "dense"),
        "milliseconds": milliseconds(times),
    }


def peft_batch(
    base: Path, adapters: dict[str, Path], device: str, rounds: int, tokens: int
) -> dict[str, Any]:
    """The same batch by PEFT, which adds each row's adapter to every linear layer."""
    from peft import PeftModel

    plain: Any = load_plain(base)
    plain.to(device)
    names = list(adapters)
    model = PeftModel.from_pretrained(plain, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters[name], adapter_name=name)
    model.to(device, torch.bfloat16).eval()
    rows = [name for name in names for _ in range(ROWS_PER_EXPERT)]
    ids = prompts(len(rows), device)
    options = {"attention_mask": torch.ones_like(ids), "adapter_names": rows, **greedy(tokens)}
    with torch.no_grad():
        times = in_turns(
            rounds, peft=lambda: seconds(lambda: model.generate(input_ids=ids, **options))
        )
    return {"milliseconds": milliseconds(times)}


def offloading(root: Path, device: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Answers of two experts in turn, resident on the device and in host memory."""
    models = {
        "resident": load(root, device),
        "host": load(root, device, residency="cpu"),
    }
    ids = prompts(1, device)
    mask, turn = torch.ones_like(ids), iter(range(10**6))

    def answer(model: MediatorModel) -> float:
        name = model.experts[next(turn) // 2 % 2]
        return seconds(
            lambda: model.generate(ids, mask, mixture=name, apply="merge", **greedy(tokens))
        )

    times = in_turns(rounds, **{n: (lambda m=m: answer(m)) for n, m in models.items()})  # type: ignore[misc]

    def enter(model: MediatorModel) -> float:
        context = model.mixture({model.experts[next(turn) % 2]: 1.0})
        took = seconds(context.__enter__)
        context.__exit__(None, None, None)
        return took

    entered = in_turns(3 * rounds, **{n: (lambda m=m: enter(m)) for n, m in models.items()})  # type: ignore[misc]
    return {
        "tokens": tokens,
        "host_over_resident": ratio(times, "host", "resident"),
        "milliseconds": milliseconds(times),
        "enter_milliseconds": milliseconds(entered),
    }
