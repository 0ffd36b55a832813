"""Many experts: is accuracy kept, what does one more cost, and who notices when one comes or goes?

    python benchmarks/router_many.py BASE_DIR

Up to 64 reasoning-gym tasks in their own wording, routed by mean embeddings of BASE_DIR. Times are
of one request at a time, every number of experts in turn, so that their ratios mean something.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import record
import router_prompts as prompts
import torch
from router import CALIBRATION_SEED, PER_EXPERT, REPORT_SEED, accuracy, together
from router_features import Model
from torch import Tensor

from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.features import embedding_features, mean_embedding, shared_tokens
from mergekit_mediator.route.fit import add, fit, remove

COUNTS = (4, 8, 16, 32, 64)


def milliseconds(
    routers: dict[int, CalibratedRouter], rows: list[list[int]], table: Tensor, repeats: int = 40
) -> dict[int, list[float]]:
    """From token ids to a decision, for each number of experts."""
    times: dict[int, list[float]] = {count: [] for count in routers}
    for row in rows * repeats:
        ids = torch.tensor([row])
        for count, router in routers.items():
            began = time.perf_counter()
            router.decide(mean_embedding(ids, torch.ones_like(ids), table, router.tokens))
            times[count].append(1000 * (time.perf_counter() - began))
    return {count: sorted(found) for count, found in times.items()}


def main() -> None:
    prompts.same_every_time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Model(arguments.base)
    train, test = (
        model.rows({task: prompts.questions(task, count, seed) for task in prompts.MANY})
        for count, seed in ((PER_EXPERT, CALIBRATION_SEED), (10, REPORT_SEED))
    )
    excluded = shared_tokens(train)
    known = embedding_features(train, model.table, excluded)
    asked = embedding_features(test, model.table, excluded)
    routers: dict[int, CalibratedRouter] = {}
    rows: dict[str, Any] = {}
    for count in COUNTS:
        some = dict(list(known.items())[:count])
        began = time.perf_counter()
        routers[count] = fit(some, "embedding", tokens=excluded).router
        mine = {task: asked[task] for task in some}
        rows[str(count)] = {
            "accuracy": accuracy(routers[count].decide(together(mine)).weights, mine),
            "fit_seconds": time.perf_counter() - began,
        }
    times = milliseconds(routers, [group[0] for group in test.values()][:16], model.table)
    for count, found in times.items():
        middle = found[len(found) // 2]
        rows[str(count)] |= {
            "median_ms": middle,
            "p99_ms": found[int(0.99 * len(found))],
            "over_4_experts": middle / times[4][len(times[4]) // 2],
        }
    router, last = routers[64], prompts.MANY[63]
    without = remove(router, last).router
    again = add(without, last, known[last]).router
    others = together({task: asked[task] for task in without.experts})
    before, after = (r.decide(others).weights.argmax(dim=1) for r in (router, without))
    figures = {
        "prompts_per_expert": PER_EXPERT,
        "by_experts": rows,
        "removing_one": {
            "features_of_others_untouched": all(
                torch.equal(without.features[t], router.features[t]) for t in without.experts
            ),
            "requests_of_others": len(others),
            "routed_as_before": float((before == after).double().mean()),
            "adding_it_back_gives_the_same_router": torch.equal(again.weight, router.weight),
        },
    }
    record.write("router-many", figures, {"calibration": CALIBRATION_SEED, "report": REPORT_SEED})


if __name__ == "__main__":
    main()
