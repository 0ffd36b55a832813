"""An artifact that was written by the version of 2026-11-26 00:46 (55f9251), before the package had rooms.

It was merged from pico models with int8 values in some layers and calibrated on embeddings. Beside it are the
digests of the weights under some mixtures and the routers' decisions, as that version gave them.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_mediator import MediatorModel
from mergekit_mediator.store.manifest import read_manifest
from mergekit_mediator.store.verification import verify_files

ARTIFACT = Path(__file__).parents[1] / "data" / "old_artifact"
EXPECTED = json.loads(ARTIFACT.with_name("old_artifact_expected.json").read_text())


@pytest.fixture(scope="module")
def old():
    return MediatorModel.from_pretrained(ARTIFACT)


def digest(model):
    """Of all weights, bit for bit."""
    state = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        state.update(name.encode())
        state.update(weight.detach().view(torch.int16).numpy().tobytes())
    return state.hexdigest()


def test_an_old_artifact_verifies():
    verify_files(ARTIFACT, read_manifest(ARTIFACT))


@pytest.mark.parametrize("mixture", EXPECTED["weights"])
def test_every_mixture_of_an_old_artifact_gives_the_same_bits(old, mixture):
    assert old.experts == tuple(EXPECTED["experts"])
    with old.mixture(json.loads(mixture)) as model:
        assert digest(model) == EXPECTED["weights"][mixture]


@pytest.mark.parametrize(
    ("router", "decisions"), [(None, EXPECTED["routed"]), ("likelihood", EXPECTED["likelihood"])]
)
def test_every_router_of_an_old_artifact_decides_the_same(old, router, decisions):
    weights = old.route(list(decisions), router=router).weights
    expected = torch.tensor(list(decisions.values()))
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-3)


def test_the_remote_code_of_an_old_artifact_finds_the_package():
    model = AutoModelForCausalLM.from_pretrained(ARTIFACT, trust_remote_code=True)
    assert model.mediator.experts == tuple(EXPECTED["experts"])
