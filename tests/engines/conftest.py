"""An artifact that engines serve."""

import pytest
import served_pico
import torch


@pytest.fixture(scope="session")
def artifact(make, tmp_path_factory):
    """A calibrated pico artifact of three adapters. Read only."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp("artifact")
    family = make(served_pico.wide_llama, experts=(), dtype=torch.float32)
    config = MergeConfiguration.model_validate(served_pico.config(family, root))
    run(config, str(root / "out"), MergeOptions(quiet=True, lora_merge_cache=str(root / "cache")))
    return served_pico.calibrate(root / "out", root)
