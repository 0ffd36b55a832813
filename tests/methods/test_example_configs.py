"""The example of every merge method runs as it stands, on pico models in the place of its own."""

import json
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import ParameterScope
from transformers import AutoModelForCausalLM

from mergekit_mediator.methods.data_free import DATA_FREE
from mergekit_mediator.methods.with_prompts import WITH_PROMPTS

ROOT = Path(__file__).parents[2]
KINDS = {kind.spec.name: kind for kind in (*DATA_FREE, *WITH_PROMPTS)}
NAMES = list(KINDS)

every_method = pytest.mark.parametrize("method", NAMES)


def example(method):
    return (ROOT / f"configs/{method}.yml").read_text(encoding="utf-8")


@every_method
def test_every_example_merges_with_the_stock_command(
    method, family, merged, read, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"w{n} w{2 * n}"}) for n in range(5)]
    for file in ("chat.jsonl", "code.jsonl", "math.jsonl"):
        (tmp_path / file).write_text("\n".join(lines))
    config = yaml.safe_load(example(method))
    config["base_model"] = str(family.base)
    for entry, expert in zip(config["models"], family.experts.values(), strict=True):
        entry["model"] = str(expert)
    out = merged(config)
    assert AutoModelForCausalLM.from_pretrained(out) is not None
    written, base = read(out), read(family.base)
    changed = [name for name in base if not written[name].equal(base[name])]
    assert "model.layers.0.mlp.up_proj.weight" in changed


@every_method
def test_every_example_names_its_method_and_models_of_the_hub(method):
    config = MergeConfiguration.model_validate(yaml.safe_load(example(method)))
    assert config.merge_method == method
    assert f"mergekit-yaml configs/{method}.yml out" in example(method)
    assert all(len(model.model.path.split("/")) == 2 for model in config.referenced_models())


@every_method
def test_every_method_has_its_section_with_every_parameter(method):
    text = (ROOT / "docs/merge_methods.md").read_text(encoding="utf-8")
    section = text.split(f"(`{method}`)\n", 1)[1].split("\n### ")[0]
    spec = KINDS[method].spec
    for parameter in spec.parameters:
        if parameter.name not in ("weight", "lambda", "prompts"):
            scope = "global" if parameter.scope == ParameterScope.SHARED else "per model"
            assert f"- `{parameter.name}` ({scope}" in section
            if not isinstance(parameter.default, bool | None):
                assert f"`{parameter.default}`" in section
    assert f"merge_method: {method}\n" in section
    assert spec.reference_url in section
