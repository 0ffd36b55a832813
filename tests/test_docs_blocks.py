"""The YAML and Python blocks of README and docs run as they stand, on pico models."""

import json
import re

import adapters
import pytest
import torch
import yaml
from documents import blocks, documents, name
from transformers import AutoModelForCausalLM

from mergekit_mediator.merge.low_rank_methods import ARTIFACTS

WITH_YAML = [path for path in documents() if blocks(path, "yaml")]
WITH_PYTHON = [path for path in documents() if blocks(path, "python")]
CONFIGS = [(name(path), n) for path in WITH_YAML for n in range(len(blocks(path, "yaml")))]


@pytest.fixture(scope="module")
def pico(make):
    return make(experts=("math", "code"), dtype=torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the prompts that the documents name."""
    lines = [json.dumps({"prompt": f"w{n % 50} w{n // 3 % 50}"}) for n in range(120)]
    for file in ("math.jsonl", "code.jsonl"):
        (tmp_path / file).write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_pico(text, family, folder):
    """A configuration of the documents with pico models in the place of its own.

    Tokenizer and headers are most of a pico checkpoint, so that a budget is widened, too.
    """
    config = yaml.safe_load(re.sub(r"budget: [\d.]+x", "budget: 3x", text))
    config["base_model"] = str(family.base)
    for entry, expert in zip(config["models"], family.experts.items(), strict=True):
        if "+" in entry["model"]:
            entry["model"] = f"{family.base}+{folder / expert[0]}"
            adapters.train(family.base, folder / expert[0], seed=1)
        else:
            entry["model"] = str(expert[1])
    return config


@pytest.mark.parametrize(("page", "number"), CONFIGS)
def test_every_configuration_merges(page, number, pico, folder, merged):
    path = next(path for path in WITH_YAML if name(path) == page)
    config = on_pico(blocks(path, "yaml")[number], pico, folder)
    out = merged(config)
    assert AutoModelForCausalLM.from_pretrained(out) is not None
    stored = (out / "mediator/manifest.json").exists()
    assert stored == (config["merge_method"] in ARTIFACTS)


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name)
def test_every_python_block_runs_after_those_before_it(path, pico, folder, merged):
    merged(pico.config(route="all", density=0.3), name="OUT")
    namespace = {}
    for number, block in enumerate(blocks(path, "python")):
        exec(compile(block, f"{name(path)}, block {number}", "exec"), namespace)
