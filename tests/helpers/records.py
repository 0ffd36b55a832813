"""Figures of an artifact, its router and its evaluation, as the commands give them."""

from mergekit_mediator.store.digests import FileDigest
from mergekit_mediator.store.manifest import BaseEntry, ExpertEntry, LayerEntry, Manifest

EXPERTS = ["math", "code"]
SIZES = {
    "model.safetensors": 10_000_000,
    "mediator/experts/math.safetensors": 400_000,
    "mediator/experts/code.safetensors": 600_000,
}

ROUTER = {
    "experts": EXPERTS,
    "accuracy": 0.95,
    "ece": 0.04,
    "confusion": [[9, 1], [0, 10]],
    "reliability": [[4, 0.6, 0.75], [16, 0.97, 1.0]],
    "prompts": {"math": 10, "code": 10},
    "temperature": 0.2,
    "entropy_threshold": 0.8,
    "ood_threshold": 1.5,
}


def score(accuracy, n=8):
    return {"accuracy": accuracy, "answer_log_likelihood": -0.5, "n": n}


def system(mean, worst, size, math, code):
    return {
        "normalized_mean": mean,
        "normalized_worst": worst,
        "total_bytes_over_base": size,
        "tasks": {"math": score(math), "code": score(code)},
    }


def evaluation(**changes):
    """The figures of `evaluate`; the artifact is as good as its experts at a twentieth of their bytes."""
    return {
        "artifact": "0" * 64,
        "sources": {"math": "math.jsonl", "code": "gym:codes"},
        "systems": {
            "base": system(12.5, 0.0, 1.0, 0.0, 0.25),
            "experts": system(100.0, 100.0, 2.0, 0.5, 1.0),
            "mediator_dense": system(40.0, 30.0, 1.0, 0.25, 0.3),
            "mediator_oracle": system(100.0, 100.0, 1.05, 0.5, 1.0),
            "mediator": {**system(93.75, 87.5, 1.05, 0.5, 0.875), "routing_accuracy": 0.9375},
        },
        "routing": {
            "math": {"chosen": {"math": 8, "code": 0}, "entropy": 0.1},
            "code": {"chosen": {"math": 1, "code": 7}, "entropy": 0.2},
        },
        "reliability": [[4, 0.6, 0.75], [12, 0.97, 1.0]],
        **changes,
    }


def artifact(router=ROUTER):
    """The figures of `inspect`: an averaged layer and two routed ones."""

    def layer(name, conflict, stored):
        sizes = dict(zip(EXPERTS, stored, strict=True)) if stored else None
        return {
            "name": name,
            "routed": bool(stored),
            "conflict": {"sign": conflict, "mass": conflict / 2},
            "stored": {"bytes": sizes} if stored else None,
        }

    return {
        "experts": [{"name": name} for name in EXPERTS],
        "layers": [layer("embed", 0.1, None), layer("0", 0.8, (100, 300)), layer("1", 0.6, (0, 5))],
        "router": router,
    }


def inspected(router=ROUTER, layers=30):
    """The figures of `inspect` in full, of an artifact with so many blocks."""
    sizes = {name: 1000 * (i + 1) for i, name in enumerate(EXPERTS)}
    stored = {"bits_per_parameter": 0.5, "rank": 2.0, "density": 0.01, "bytes": sizes}
    names = ["embed", *map(str, range(layers)), "final"]
    return {
        "dense_bytes": 10_000_000,
        "total_bytes": 11_000_000,
        "total_over_dense": 1.1,
        "experts": [{"name": n, "bytes": 400_000, "bits_per_parameter": 0.5} for n in EXPERTS],
        "layers": [
            {"name": n, "routed": True, "conflict": {"mass": i / 99}, "stored": stored}
            for i, n in enumerate(names)
        ],
        "router": router,
    }


def manifest(**changes):
    """The manifest of an artifact of one layer."""
    layer = LayerEntry(name="0", weights=("w",), conflict={"mass": 0.5}, routed=True)
    fields = {
        "format_version": 1,
        "package_version": "0",
        "base": BaseEntry(source="org/base", files={}),
        "experts": tuple(
            ExpertEntry(name=n, source=f"org/{n}", file=f"experts/{n}.safetensors") for n in EXPERTS
        ),
        "layers": (layer,),
        "parameters": {"conflict": "mass", "budget": "1.1x"},
        "parameter_count": 1,
        "files": {name: FileDigest(sha256="0" * 64, bytes=n) for name, n in SIZES.items()},
    }
    return Manifest(**{**fields, **changes})
