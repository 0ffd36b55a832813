"""The generated sections of README and docs, by name: each is made from the files of results/ alone."""

from collections.abc import Callable
from functools import partial

from sections import (
    comparison,
    engines,
    expectations,
    gpu,
    merging,
    methods,
    rates,
    routing,
    serving,
    storing,
)
from sections.markdown import about

COMPARISONS = (
    *("experts-4", "experts-4-again", "experts-4-cut-short", "experts-4-third"),
    *("experts-8", "experts-overlap"),
)
# Merges with `keep: 0.99` and nothing tuned: of four experts, and of those of a second base model.
KEPT, SECOND = "experts-4-keep", "experts-gemma"
SECOND_KEPT = "experts-gemma-keep"
# Merges of the second and the third draw, in the default form and as signs within a budget.
DRAWS = (
    *("experts-4-again-keep", "experts-4-third-keep"),
    *("experts-8-again-keep", "experts-8-third-keep"),
    *("experts-4-again-signs", "experts-4-third-signs"),
    *("experts-8-again-signs", "experts-8-third-signs"),
)
# Results whose page says how they were made.
RECORDS = (
    *(*COMPARISONS, KEPT, SECOND, SECOND_KEPT, *DRAWS),
    *(
        "ablations",
        "blending",
        "broad",
        "codec",
        "demo",
        "dense",
        "faults",
        "gpu",
        "gpu-before",
        "heavy",
        "hot",
        "keep",
        "layers",
        "lossless",
        "merge-cost",
    ),
    "methods",
    "other-texts",
    "own-texts",
    *(
        "rates",
        "replicas",
        "router",
        "router-many",
        "router-no-data",
        "runtime",
        "scale",
        "serving",
        "settings",
        "signs-as-adapters",
    ),
    "startup",
    "weighed-errors",
)

SECTIONS: dict[str, Callable[[], str]] = {
    "systems": comparison.systems,
    "against": comparison.against,
    "kept": comparison.kept,
    **{
        name: partial(comparison.experts, name)
        for name in (*COMPARISONS, KEPT, SECOND, SECOND_KEPT)
    },
    **{f"{name} findings": partial(comparison.findings, name) for name in COMPARISONS},
    "experts-gemma findings": comparison.second_base,
    "draws": partial(comparison.draws, *DRAWS),
    "experts-4 rivals": comparison.rivals,
    "experts-4-cut-short budget": comparison.budget_split,
    "ablations": comparison.ablations,
    "demo": merging.demo,
    "merge-cost": merging.merge_cost,
    "methods": methods.costs,
    "method-quality": methods.quality,
    "method-summary": methods.summary,
    "random signs": partial(methods.random_signs, "eight"),
    "random signs, broad": partial(methods.random_signs, "broad"),
    "dense": merging.dense,
    "dense kept": merging.dense_kept,
    "faults": merging.faults,
    "scale-memory": merging.scale_memory,
    "scale": merging.scale,
    "startup": merging.startup,
    "codec": storing.codec,
    "lossless": storing.lossless,
    "keep": storing.keep,
    "keep, random signs": partial(storing.keep, "random_sign"),
    "noise of broad changes": storing.noise,
    "signs as adapters": storing.signs_as_adapters,
    "other texts": storing.other_texts,
    "own-texts": storing.own_texts,
    "rates": rates.rates,
    "expectations": expectations.expectations,
    "expected of adapters": expectations.adapters,
    "rates ahead": rates.ahead,
    "heavy": rates.heavy,
    "heavy changes": rates.heavy_changes,
    "broad": partial(rates.heavy, "broad"),
    "broad changes": partial(rates.heavy_changes, "broad"),
    "hot": partial(rates.heavy, "hot"),
    "hot changes": partial(rates.heavy_changes, "hot"),
    "settings": rates.settings,
    "heavy ahead": partial(rates.ahead, "heavy"),
    "gpu card": gpu.card,
    "gpu merging": gpu.merging,
    "gpu serving": gpu.serving,
    "gpu peft": gpu.peft,
    "gpu steps": gpu.steps,
    "weighed-errors": rates.weighed_errors,
    "runtime": serving.runtime,
    "serving": engines.serving,
    "exported": engines.exported,
    "rank_errors": engines.rank_errors,
    "replicas": engines.replicas,
    "router": routing.router,
    "router-many": routing.router_many,
    "blending": routing.blending,
    "layers": routing.layers,
    "layers findings": routing.layer_findings,
    **{f"about {name}": partial(about, name) for name in RECORDS},
}
