"""The routers that need no data, on LoRA experts of the easy tasks and a dense expert, their mean.

    python benchmarks/router_dataless.py BASE_DIR --adapters DIR

DIR holds a LoRA adapter for each task, under the task's name. Writes results/router-no-data.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import router_prompts as prompts
import torch
from router_features import Model
from safetensors.torch import load_file
from torch import Tensor

from mergekit_mediator.route.decision import decide_from_scores
from mergekit_mediator.route.response import ResponseRouter, is_measured, leading_directions

REPORT_SEED = 100_007
TaskVectors = dict[str, Tensor]


def task_vectors(adapter: Path) -> TaskVectors:
    """τ by weight name, float32, of a LoRA adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.", "."): scale
        * (tensors[key.replace("lora_A", "lora_B")].float() @ a.float())
        for key, a in tensors.items()
        if "lora_A" in key
    }


class Experts:
    """A model whose weights are set to the mean of the experts, or to one of them."""

    def __init__(self, base: Path, adapters: Path, names: list[str]) -> None:
        self.host = Model(base)
        self.names = names
        self.vectors = {name: task_vectors(adapters / name) for name in names}
        self.base = {k: v.clone() for k, v in self.host.model.state_dict().items()}

    def put(self, weights: Mapping[str, float]) -> None:
        state = self.host.model.state_dict()
        for weight in next(iter(self.vectors.values())):
            change = sum(p * self.vectors[name][weight] for name, p in weights.items())
            state[weight].copy_(self.base[weight].float() + change)

    def put_mean(self) -> None:
        self.put({name: 1 / len(self.names) for name in self.names})

    @torch.no_grad()
    def likelihood(self, rows: list[list[int]]) -> Tensor:
        """Log-likelihood in nats of each prompt after its opening, `[n]`."""
        opening, sums = self.host.opening, []
        for row in rows:
            logits = self.host.model(input_ids=torch.tensor([row]), use_cache=False).logits
            logp = logits[0, opening - 1 : -1].float().log_softmax(dim=1)
            sums.append(logp.gather(1, torch.tensor(row[opening:])[:, None]).sum())
        return torch.stack(sums)

    @torch.no_grad()
    def responses(self, router: ResponseRouter, row: list[int]) -> dict[str, Tensor]:
        counted = torch.arange(len(row))[None] >= self.host.opening
        with router.recording(self.host.model, counted) as found:
            self.host.model.model(input_ids=torch.tensor([row]), use_cache=False)
        return found


def measure(
    base: Path, adapters: Path, known: Mapping[str, list[str]], away: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Accuracy and distance of `response`, and accuracy of `likelihood`."""
    experts = Experts(base, adapters, list(known))
    width = experts.host.table.shape[1]
    names = [n for n, v in experts.base.items() if is_measured(v.shape, width)]
    directions = {
        name: torch.stack([leading_directions(v[name]) for v in experts.vectors.values()])
        for name in names
        if all(name in v for v in experts.vectors.values())
    }
    router = ResponseRouter(tuple(known), directions)
    truth = torch.repeat_interleave(torch.tensor([len(p) for p in known.values()]))
    rows = {k: [experts.host.ids(p) for p in ps] for k, ps in [*known.items(), *away.items()]}
    asked = [row for task in known for row in rows[task]]
    experts.put_mean()
    reference = experts.responses(router, experts.host.ids(""))

    def decide(requests: list[list[int]]) -> Any:
        found = [experts.responses(router, row) for row in requests]
        return router.decide({k: torch.cat([f[k] for f in found]) for k in reference}, reference)

    decision = decide(asked)
    right = decision.weights.argmax(dim=1) == truth
    response: dict[str, Any] = {
        "accuracy": float(right.double().mean()),
        "largest_normalized_entropy": float(decision.normalized_entropy.max()),
        "bytes_per_expert": sum(d[0].numel() * 2 for d in directions.values()),
    }
    for name in away:
        far = decide(rows[name]).ood
        greater = (far[None] > decision.ood[:, None]).double().mean()
        response[f"ood_{name}_auroc"] = float(greater)
    dense = experts.likelihood(asked)
    scores = []
    for name in known:
        experts.put({name: 1.0})
        scores.append(experts.likelihood(asked) - dense)
    weights = decide_from_scores(torch.stack(scores, dim=1), tuple(known)).weights
    likelihood = {"accuracy": float((weights.argmax(dim=1) == truth).double().mean())}
    return {"prompts": len(asked), "response": response, "likelihood": likelihood}


def main() -> None:
    prompts.same_every_time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    easy = prompts.easy(15, REPORT_SEED)
    away = {"near": prompts.near(2, REPORT_SEED), "far": prompts.far(30, REPORT_SEED)}
    figures = measure(arguments.base, arguments.adapters, easy, away)
    record.write("router-no-data", figures, {"report": REPORT_SEED})


if __name__ == "__main__":
    main()
