"""What several test files need: pico checkpoints, the stock `mergekit-yaml` command, a routed model."""

import os

# read when the libraries are imported: no test may reach for the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import yaml
from families import Family, make_family
from hypothesis import settings
from safetensors.torch import load_file

settings.register_profile("mediator", deadline=None, max_examples=40, database=None)
settings.load_profile("mediator")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """An untied pico Llama in bfloat16 and three experts. Read only."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    """Writes a family; the arguments are those of `pico.save_family`."""
    return lambda *args, **options: make_family(tmp_path_factory.mktemp("family"), *args, **options)


@pytest.fixture
def mergekit_yaml(tmp_path: Path) -> Callable[..., click.testing.Result]:
    """Runs the stock `mergekit-yaml` in this process on a configuration."""
    from mergekit.scripts.run_yaml import main

    def run(config: dict[str, Any] | str, out: Path, *options: str) -> click.testing.Result:
        path = tmp_path / "config.yml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        arguments = [str(path), str(out), "--quiet", *options]
        return click.testing.CliRunner().invoke(main, arguments)

    return run


@pytest.fixture
def merged(
    mergekit_yaml: Callable[..., click.testing.Result], tmp_path: Path
) -> Callable[..., Path]:
    """Merges a configuration with the stock command and gives the output directory."""

    def run(config: dict[str, Any] | str, *options: str, name: str = "out") -> Path:
        result = mergekit_yaml(config, tmp_path / name, *options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return run


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint directory."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


@pytest.fixture(scope="session")
def read() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Reads all weights of a checkpoint directory."""
    return tensors


@pytest.fixture
def refused(mergekit_yaml, tmp_path):
    """Runs the stock command, which must refuse; gives the one line that it says."""

    def run(config, *options):
        result = mergekit_yaml(config, tmp_path / "out", *options)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code != 0
        lines = [line for line in result.output.splitlines() if line.startswith("Error")]
        assert len(lines) == 1, result.output
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))
        return lines[0]

    return run


@pytest.fixture(scope="module")
def loaded(make, tmp_path_factory):
    import routed_pico

    return routed_pico.build(
        tmp_path_factory.mktemp("runtime") / "out", make(dtype=torch.float32), density=0.3
    )


@pytest.fixture
def model(loaded):
    """The loaded model, with its settings as new."""
    yield loaded
    for name, field in type(loaded.settings).model_fields.items():
        setattr(loaded.settings, name, field.default)


@pytest.fixture
def batch():
    """Five rows padded on the left, and their mask."""
    ids = torch.randint(4, 60, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[3, :2] = 0
    return ids, mask


@pytest.fixture(scope="session")
def artifact(make, tmp_path_factory):
    """A calibrated pico artifact of three adapters. Read only."""
    import served_pico
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    root = tmp_path_factory.mktemp("artifact")
    family = make(served_pico.wide_llama, experts=(), dtype=torch.float32)
    config = MergeConfiguration.model_validate(served_pico.config(family, root))
    run(config, str(root / "out"), MergeOptions(quiet=True, lora_merge_cache=str(root / "cache")))
    return served_pico.calibrate(root / "out", root)
