"""Writes prompted.safetensors: what fusion_bench's code makes of small random models and random figures.

    python tests/data/methods/make_prompted.py CLONES

CLONES is the folder of `make.py`; of it only the clone of fusion_bench is needed.
"""

import json
import sys
import typing
from pathlib import Path

import torch
from make import EXPERTS, SEED, SOURCES, Model, definitions, models
from safetensors.torch import save_file

SOURCE = SOURCES["opcm"]
OFF_DIAGONAL = 0.9
TYPES = {name: getattr(typing, name) for name in ("Dict", "List")} | {"Tensor": torch.Tensor}


def fisher(clone, experts, information):
    path = clone / "fusion_bench/method/fisher_merging/fisher_merging.py"
    names = ["get_models_fisher_norm", "merging_with_fisher_weights"]
    code = definitions(path, names, **TYPES)
    return code.merging_with_fisher_weights(by_name(experts), information, torch.ones(EXPERTS))


def regmean_pp(clone, experts, products):
    path = clone / "fusion_bench/method/regmean_plusplus/regmean_plusplus.py"
    names = [
        "reduce_non_diagonal_elements",
        "regmean_params_merge",
        "merging_with_regmean_weights",
    ]
    code = definitions(path, names, **TYPES)
    return code.merging_with_regmean_weights(by_name(experts), products, OFF_DIAGONAL)


def by_name(experts):
    return {name: [e.state_dict()[name] for e in experts] for name in experts[0].state_dict()}


def main():
    clone = Path(sys.argv[1]) / SOURCE.split("@")[0].replace("/", "+")
    base, *experts = models(Model)
    generator = torch.Generator().manual_seed(SEED)
    state, tensors = base.state_dict(), {}
    information, products = [], []
    for index in range(EXPERTS):
        drawn = {n: torch.randn(w.shape, generator=generator) ** 2 + 0.1 for n, w in state.items()}
        information.append({n: 10.0**index * f for n, f in drawn.items()})
        rows = {n: torch.randn(40, w.shape[-1], generator=generator) for n, w in state.items()}
        linear = {n.removesuffix(".weight"): x for n, x in rows.items() if state[n].ndim == 2}
        products.append({n: x.T @ x / len(x) for n, x in linear.items()})
        tensors |= {f"information/{index}/{n}": f for n, f in information[index].items()}
        tensors |= {f"products/{index}/{n}.weight": p for n, p in products[index].items()}
    for method, figures in ((fisher, information), (regmean_pp, products)):
        for name, merged in method(clone, experts, figures).items():
            tensors[f"{method.__name__}/{name}"] = (merged - state[name]).detach().contiguous()
    about = {
        "command": "python tests/data/methods/make_prompted.py CLONES",
        "sources": json.dumps(SOURCE),
        "torch": torch.__version__,
    }
    save_file(tensors, Path(__file__).with_name("prompted.safetensors"), about)


if __name__ == "__main__":
    main()
