"""Shrink a LoRA adapter to a number of parameters, keeping what its product needs most.

    python benchmarks/shrink_adapter.py ADAPTER OUT --parameters 1005000

The product B·A of each module is decomposed, and singular values are kept in the order of their
square per parameter that they cost, over all modules together. The bundled adapters were made so
from adapters of rank 16.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def shrink(tensors: dict[str, torch.Tensor], parameters: int) -> dict[str, torch.Tensor]:
    """The factors `lora_A [r, in]` and `lora_B [out, r]` of every module, with ranks of their own."""
    factors, candidates = {}, []
    for name in (n for n in tensors if "lora_A" in n):
        a, b = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(rb @ ra.T)
        factors[name] = (qb @ u * s.sqrt(), s.sqrt()[:, None] * (v @ qa.T))
        cost = a.shape[1] + b.shape[0]
        candidates += [(float(x * x) / cost, name, cost) for x in s]
    ranks = dict.fromkeys(factors, 0)
    for _, name, cost in sorted(candidates, reverse=True):
        if cost <= parameters:
            ranks[name] += 1
            parameters -= cost
    kept = {}
    for name, rank in ranks.items():
        left, right = factors[name]
        kept[name] = right[: max(rank, 1)].to(torch.bfloat16).contiguous()
        kept[name.replace("lora_A", "lora_B")] = left[:, : max(rank, 1)].bfloat16().contiguous()
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", type=int, default=1_005_000)
    arguments = parser.parse_args()
    config = json.loads((arguments.adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    kept = shrink(load_file(arguments.adapter / "adapter_model.safetensors"), arguments.parameters)
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in kept.items()
        if "lora_A" in name
    }
    config["rank_pattern"] = ranks
    config["alpha_pattern"] = {name: scale * rank for name, rank in ranks.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(kept, arguments.out / "adapter_model.safetensors", metadata={"format": "pt"})
    (arguments.out / "adapter_config.json").write_text(json.dumps(config) + "\n")


if __name__ == "__main__":
    main()
