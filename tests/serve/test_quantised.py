"""Models that torchao, bitsandbytes or quanto load in 8 or 4 bits are refused with the reason."""

import pytest
import torch
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import MixtureError


def torchao_config(bits):
    dtype = {8: torch.int8, 4: torch.int4}[bits]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(8)))


def bitsandbytes_config(bits):
    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)


def quanto_config(bits):
    return QuantoConfig(weights=f"int{bits}")


@pytest.fixture(scope="module")
def out(make, tmp_path_factory):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    directory = tmp_path_factory.mktemp("quantised") / "out"
    config = MergeConfiguration.model_validate(make().config(route="all", density=0.3))
    run(config, str(directory), MergeOptions(quiet=True))
    return directory


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("library", [torchao_config, bitsandbytes_config, quanto_config])
def test_a_quantised_model_is_refused_with_the_reason(out, library, bits):
    config = library(bits)
    with pytest.raises(MixtureError, match=r"quantization_config: .* load the model in bfloat16"):
        MediatorModel.from_pretrained(out, quantization_config=config)
    dense = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=config, dtype=torch.bfloat16
    )
    stock = type(dense)
    with pytest.raises(MixtureError, match=r"weight.* required, got .*without quantization"):
        MediatorModel.attach(dense, out)
    assert type(dense) is stock


def test_remote_code_refuses_quantization_too(out):
    with pytest.raises(MixtureError, match=r"load_in_8bit: .* leave it out"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, load_in_8bit=True)
