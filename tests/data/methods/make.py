"""Writes references.safetensors: what the authors' own code makes of small random models.

    python tests/data/methods/make.py CLONES

CLONES is a folder with clones of the repositories in SOURCES, each at the commit given there. None of their code is
part of this project, and none of it needs to be installed: what a file imports and does not need is stubbed.
"""

import ast
import contextlib
import copy
import json
import re
import sys
import time
import types
import typing
from collections import OrderedDict, defaultdict
from pathlib import Path
from unittest.mock import MagicMock

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

SOURCES = {
    "tsvm": "AntoAndGar/task_singular_vectors@a6c97188f7aa0bb20753de4f2939be89dd64f1c3",
    "iso_c": "danielm1405/iso-merging@d34010af8ba129ef4d17a91ca9943b413fe06f8c",
    "wudi": "nathanielyvo/WUDI-Merging@dc3cd1204a68d1930a32da11c5cddb0cbd7410bb",
    "pcb": "duguodong7/pcb-merging@5897888b5d24adfcd33e124793d113746e00f3ff",
    "widen": "yule-BUAA/MergeLLM@9178ef93846aa1df9a3a2c28886a346184edfa79",
    "localize_and_stitch": "yifei-he/Localize-and-Stitch@8b8ea4612cb4922909dcbbfbbada4d888e4006fc",
    "opcm": "tanganke/fusion_bench@54c9e8c9d9621620c720452cd8533332a32d3689",
    "doge": "tanganke/fusion_bench@54c9e8c9d9621620c720452cd8533332a32d3689",
}
SEED, EXPERTS, SIZE = 0, 3, 0.05


class Model(nn.Module):
    """Matrices of three shapes and a norm; the names are those that DOGE's code looks for."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict(
            {
                "square": nn.Linear(8, 8, bias=False),
                "tall": nn.Linear(6, 14, bias=False),
                "wide": nn.Linear(14, 6, bias=False),
                "layer_norm": nn.LayerNorm(14),
            }
        )


class Language(nn.Module):
    """The same as WIDEN's code expects it: an embedding, a layer and a head."""

    def __init__(self):
        super().__init__()
        layer = nn.ModuleDict({"up": nn.Linear(8, 12, bias=False), "norm": nn.LayerNorm(8)})
        self.model = nn.ModuleDict(
            {"embed_tokens": nn.Embedding(20, 8), "layers": nn.ModuleList([layer])}
        )
        self.lm_head = nn.Linear(8, 20, bias=False)


def models(kind):
    """A base model and its experts, of random weights."""
    generator = torch.Generator().manual_seed(SEED)
    made = [kind() for _ in range(EXPERTS + 1)]
    with torch.no_grad():
        for base, *experts in zip(*(m.parameters() for m in made), strict=True):
            base.copy_(torch.randn(base.shape, generator=generator))
            for expert in experts:
                expert.copy_(base + SIZE * torch.randn(base.shape, generator=generator))
    return made


def definitions(path, names, **scope):
    """Executes only the named functions and classes of a source file, in a scope with torch."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope = {"torch": torch, "nn": nn, "tqdm": lambda x, **_: x, "Path": Path, **scope}
    exec(compile(tree, str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def task_vectors(base, experts):
    """Objects as the CLIP repositories have them: `vector` by name."""
    own = base.state_dict()
    return [
        types.SimpleNamespace(vector={k: v - own[k] for k, v in e.state_dict().items()})
        for e in experts
    ]


def tsvm(clone, base, experts):
    code = definitions(clone / "src/utils/TSVM_utils.py", ["compute_and_sum_svd_mem_reduction"])
    config = types.SimpleNamespace(DATASETS=list(range(EXPERTS)), device="cpu")
    return code.compute_and_sum_svd_mem_reduction(task_vectors(base, experts), config)


def iso_c(clone, base, experts):
    code = definitions(clone / "src/utils/iso.py", ["iso_c"])
    return code.iso_c(task_vectors(base, experts), types.SimpleNamespace(device="cpu"))


def wudi(clone, base, experts):
    code = definitions(clone / "vit/wudi_main.py", ["get_redundant_task_vector"])
    vectors = task_vectors(base, experts)
    found = {}
    for name in vectors[0].vector:
        stacked = torch.stack([v.vector[name] for v in vectors])
        if stacked.ndim == 3:
            found[name] = code.get_redundant_task_vector(name, stacked)
    return found


def pcb(clone, base, experts):
    code = definitions(clone / "pcb-merging.py", ["normalize", "clamp", "act", "PCB_merge"])
    vectors = task_vectors(base, experts)
    flat = torch.stack([torch.cat([t.flatten() for t in v.vector.values()]) for v in vectors])
    merged, _, _ = code.PCB_merge(flat, pcb_ratio=0.1)
    sizes = [t.numel() for t in vectors[0].vector.values()]
    parts = zip(vectors[0].vector.items(), merged.split(sizes), strict=True)
    return {name: part.view(t.shape) for (name, t), part in parts}


def widen(clone, base, experts):
    folder, scope = clone / "model_merging_methods", {"re": re, "defaultdict": defaultdict}
    scope |= {
        "OrderedDict": OrderedDict,
        "get_param_names_to_merge": lambda input_param_names, **_: input_param_names,
    }
    scope["TaskVector"] = definitions(folder / "task_vector.py", ["TaskVector"], **scope).TaskVector
    code = definitions(folder / "merging_methods.py", ["MergingMethod"], **scope)
    merged = code.MergingMethod("widen_merging").widen_merging(base, experts, [])
    return {name: merged[name] - weight for name, weight in base.state_dict().items()}


def localize_and_stitch(clone, base, experts):
    code = definitions(clone / "localize_utils.py", ["Localizer", "Stitcher"], np=None)
    options = types.SimpleNamespace(sparsity=0.2, sigmoid_bias=5)
    names = dict(base.named_parameters())
    masks = []
    for expert in experts:
        localizer = code.Localizer(
            names, fresh(base), fresh(base), expert, "", None, options, model_type="roberta"
        )
        masks.append(localizer.interpolate_model(round_=True, return_mask=True)[0])
    merged = code.Stitcher(names, fresh(base), base, experts, masks).interpolate_models()
    own = base.state_dict()
    return {name: weight - own[name] for name, weight in merged.state_dict().items()}


def fresh(model):
    """A copy of a model."""
    return copy.deepcopy(model)


class Stub:
    """In place of the base classes of fusion_bench."""

    fabric = MagicMock(device="cpu")
    log_dir = None
    profile = staticmethod(lambda *_: contextlib.nullcontext())
    print_profile_summary = staticmethod(lambda: None)
    _program = MagicMock()
    _config_mapping: typing.ClassVar = {}

    def __init__(self, **_):
        pass


class Pool:
    """The models, as fusion_bench's algorithms ask for them."""

    def __init__(self, base, experts):
        self._models = {"_pretrained_": base, **dict(enumerate(experts))}
        self.model_names = list(range(len(experts)))

    def load_model(self, name):
        return fresh(self._models[name])

    def load_pretrained_model(self):
        return fresh(self._models["_pretrained_"])


STUBS = {
    **{
        name: getattr(typing, name)
        for name in ("Dict", "List", "Mapping", "Optional", "Tuple", "Union")
    },
    **{
        name: typing.Any
        for name in ("CLIPVisionModel", "CLIPVisionModelTaskPool", "Tensor", "StateDictType")
    },
    "LightningFabricMixin": type("A", (Stub,), {}),
    "SimpleProfilerMixin": type("B", (Stub,), {}),
    "BaseAlgorithm": type("C", (Stub,), {}),
    "BaseModelPool": Pool,
    "OrderedDict": OrderedDict,
    "cast": lambda _, value: value,
    "copy": copy,
    "deepcopy": copy.deepcopy,
    "is_leaf_module": lambda module: not list(module.children()),
    "log": MagicMock(),
    "np": numpy,
    "time": time,
}


def opcm(clone, base, experts):
    folder = clone / "fusion_bench/method/opcm"
    utils = definitions(
        folder / "utils.py",
        ["_svd", "svd", "get_task_vector_norm"],
        **STUBS,
        state_dict_sub=lambda a, b: {k: a[k] - b[k] for k in a},
        state_dict_to_vector=lambda d: torch.cat([v.flatten() for v in d.values()]),
    )
    code = definitions(folder / "opcm.py", ["OPCMForCLIP"], **STUBS, **vars(utils))
    algorithm = code.OPCMForCLIP(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    merged = algorithm.run(Pool(base, experts)).state_dict()
    return {name: merged[name] - weight for name, weight in base.state_dict().items()}


def doge(clone, base, experts):
    """Also the shared change that its 400 steps of Adam end at."""
    folder = clone / "fusion_bench/method/doge_ta"
    code = definitions(folder / "doge_ta.py", ["DOGE_TA_Algorithm"], **STUBS)
    algorithm = code.DOGE_TA_Algorithm(subspace=3, K=30, lamda=0.07)
    algorithm.config = types.SimpleNamespace(subspace=3, K=30, lamda=0.07)
    algorithm.fabric = MagicMock(device="cpu", backward=lambda loss: loss.backward())
    merged = algorithm.run(Pool(base, experts)).state_dict()
    matrices = {name: weight for name, weight in base.state_dict().items() if weight.ndim == 2}
    found = {name: merged[name] - weight for name, weight in matrices.items()}
    return found | {f"{name}.delta": algorithm.delta[name] for name in matrices}


def main():
    clones = Path(sys.argv[1])
    torch.Tensor.cuda = lambda self, *_, **__: self
    tensors = {}
    for method, source in SOURCES.items():
        base, *experts = models(Language if method == "widen" else Model)
        clone = clones / source.split("@")[0].replace("/", "+")
        for name, tensor in globals()[method](clone, base, experts).items():
            tensors[f"{method}/{name}"] = tensor.detach().contiguous()
    for kind in (Model, Language):
        for index, model in enumerate(models(kind)):
            for name, tensor in model.state_dict().items():
                tensors[f"models/{kind.__name__}/{index}/{name}"] = tensor
    about = {
        "command": "python tests/data/methods/make.py CLONES",
        "sources": json.dumps(SOURCES),
        "torch": torch.__version__,
    }
    save_file(tensors, Path(__file__).with_name("references.safetensors"), about)


if __name__ == "__main__":
    main()
