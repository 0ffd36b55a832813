"""What the card can do, and what each step on a weight of 4096 x 14336 takes beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_family import SEED, task_vector

from mergekit_mediator.delta.again import Adding, Overwriting
from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.mixing import displace, mix_, restore_
from mergekit_mediator.delta.sparse import encode
from mergekit_mediator.delta.stored_weight import StoredWeight
from mergekit_mediator.delta.tradeoff import slope_for, tradeoff
from mergekit_mediator.merge.conflict import Accumulator
from mergekit_mediator.route.response import leading_directions
from mergekit_mediator.store.codec import encode_bytes

RATES = (0.08, 0.25)


def milliseconds(function: Callable[[], Any], rounds: int = 5) -> float:
    """The median time of a call until the device has nothing left to do; the first call only warms up."""
    times = []
    for turn in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        if turn:
            times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings(device: str, size: int = 1 << 30) -> dict[str, float]:
    """Bytes per second, read and written, and operations per second, as library calls reach them."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source))
    host = torch.empty(size // 4, dtype=torch.uint8)
    pinned = host.pin_memory() if device != "cpu" else host
    rates = {
        "copy_gb_per_second": 2 * size / copied / 1e6,
        "from_host_gb_per_second": host.numel() / milliseconds(lambda: host.to(device)) / 1e6,
        "from_pinned_gb_per_second": host.numel() / milliseconds(lambda: pinned.to(device)) / 1e6,
    }
    width = 8192 if device != "cpu" else 512
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a, b = torch.randn(2, width, width, device=device).to(dtype)
        taken = milliseconds(lambda a=a, b=b: a @ b, rounds=3)  # type: ignore[misc]
        rates[f"{str(dtype).removeprefix('torch.')}_tflops"] = 2 * width**3 / taken / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def steps(device: str, out: int = 14336, width: int = 4096) -> dict[str, Any]:
    """Milliseconds of each step of storing one weight, and of one mixture of it."""
    generator = torch.Generator(device).manual_seed(SEED)
    base = torch.randn(out, width, generator=generator, device=device) / width**0.5
    tau = task_vector((out, width), float(base.norm()), generator)
    host = base.to("cpu", torch.bfloat16), (base + tau).to("cpu", torch.bfloat16)
    weight, expert = (tensor.to(device) for tensor in host)
    tau = expert.float() - weight.float()
    del base
    basis = torch.randn(width, width // 8, generator=generator, device=device)
    small = (basis.T[:, :width] @ tau[:width].T).to(torch.float64)
    taken: dict[str, Any] = {
        "decompose": milliseconds(lambda: decompose(tau), rounds=2),
        "qr of a tall side": milliseconds(lambda: torch.linalg.qr(tau @ basis), rounds=2),
        "eigenvalues of the small side": milliseconds(
            lambda: torch.linalg.eigh(small @ small.T), rounds=2
        ),
        "svd in its place": milliseconds(
            lambda: torch.linalg.svd(small.float(), full_matrices=False), rounds=1
        ),
        "conflict of one expert": milliseconds(
            lambda: Accumulator(host[0], 0.2, device).add(host[1]), rounds=2
        ),
        "leading directions": milliseconds(lambda: leading_directions(tau), rounds=2),
    }
    components = decompose(tau).storable()
    taken["storable components"] = components.values.numel()
    taken["tradeoff"] = milliseconds(lambda: tradeoff(tau, components), rounds=2)
    costs = tradeoff(tau, components)[0]
    forms: dict[str, StoredWeight] = {}
    for bits in RATES:
        slope = slope_for(costs, tau.numel(), bits)
        label = f"{bits:g} bits"

        def approximated(slope: float = slope) -> StoredWeight:
            return approximate(tau, slope, torch.bfloat16, 0.0, components)

        taken[f"approximate, {label}"] = milliseconds(approximated, rounds=2)
        forms[label] = approximated()
        stored = forms[label].to(torch.device("cpu"))
        taken[f"entropy coding, {label}"] = milliseconds(
            lambda stored=stored: encode_bytes(stored),  # type: ignore[misc]
            rounds=1,
        )
    taken["select a tenth"] = milliseconds(
        lambda: encode(host[1], host[0], 0.1, "exact", device), rounds=2
    )
    forms["a tenth, exact"] = encode(host[1], host[0], 0.1, "exact", device)
    for label, form in forms.items():
        terms = [(1.0, form.to(torch.device(device)))]
        saved = displace(weight, terms)
        taken[f"enter first, {label}"] = milliseconds(lambda t=terms, s=saved: mix_(weight, t, s))  # type: ignore[misc]
        taken[f"leave, {label}"] = milliseconds(lambda s=saved: restore_(weight, s))  # type: ignore[misc]
        restore_(weight, saved)
        mix_(weight, terms, saved)
        step = Overwriting.of(weight, terms) or Adding.of(weight, terms, saved)
        if step is not None:
            restore_(weight, saved)
            taken[f"enter again, {label}"] = milliseconds(lambda s=step: s(weight))  # type: ignore[misc]
        restore_(weight, saved)
        taken[f"coordinates, {label}"] = form.positions.numel()
        if form.factors is not None:
            taken[f"rank, {label}"] = form.factors.rank
    return taken


def kernels(function: Callable[[], Any], count: int = 12) -> list[dict[str, Any]]:
    """The operations of a call that take most time on the device, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        synchronize()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        {
            "name": event.key[:80],
            "calls": event.count,
            "device_ms": round(event.self_device_time_total / 1e3, 3),
            "host_ms": round(event.self_cpu_time_total / 1e3, 3),
        }
        for event in events[:count]
    ]
