import re
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_mediator.merge.config import MediatorConfig

ROOT = Path(__file__).parents[2]
# those of other methods: tests/methods/test_example_configs.py
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yml"))
    if yaml.safe_load(path.read_text())["merge_method"] == "mediator"
]


def parse(path):
    return parse_text(path.read_text())


def parse_text(text):
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    return config, MediatorConfig.from_merge_config(config)


def test_every_configuration_in_the_readme_is_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        config, parsed = parse_text(block)
        assert config.merge_method == "mediator"
        assert len(parsed.experts) > 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration(path):
    config, parsed = parse(path)
    assert config.merge_method == "mediator"
    assert all(name for name in parsed.experts.values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_example_names_models_of_the_hub(path):
    config, _ = parse(path)
    for model in config.referenced_models():
        for part in filter(None, (model.model, model.lora)):
            assert len(part.path.split("/")) == 2


def test_the_examples_show_what_the_documentation_promises():
    parsed = {path.stem: parse(path)[1] for path in CONFIGS}
    assert len(parsed["qwen2.5-7b-four-experts"].experts) == 4
    assert len(parsed["llama-3.1-8b-four-experts"].experts) == 4
    assert all(model.lora for model in parsed["lora-experts"].experts)
    assert parsed["routed-layers"].selection.rule == "routed_layers"
