from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_mediator.config import MediatorConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yml"))


def parse(path):
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    return config, MediatorConfig.from_merge_config(config)


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
