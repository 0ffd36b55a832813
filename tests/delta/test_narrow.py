"""Output dtypes that are too small for a weight: refused by name, before anything is published."""

import math

import mergekit.merge_methods
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_mediator import MediatorModel
from mergekit_mediator.delta.narrow import check_range, lost_magnitude, narrowed
from mergekit_mediator.errors import InputError
from mergekit_mediator.merge import run as merge

NAME = "model.layers.1.mlp.up_proj.weight"
LARGE = 70_000.0  # finite in bfloat16 and float32, not in float16


@pytest.fixture
def large(make):
    """A family whose models hold what a test puts there."""
    return make(dtype=torch.float32)


def put(path, value, place=(3, 4), name=NAME, dtype=None):
    """Write a number into a weight of a checkpoint; gives the path."""
    weights = load_file(path / "model.safetensors")
    weights[name] = weights[name].to(dtype or weights[name].dtype)
    weights[name][place] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def put_everywhere(family, value, **options):
    for path in (family.base, *family.experts.values()):
        put(path, value, **options)


@pytest.mark.parametrize("value", [LARGE, -LARGE])
@pytest.mark.parametrize("key", ["out_dtype", "dtype"])
@pytest.mark.parametrize(
    "settings", [{"route": "none"}, {"route": "all"}, {"route": "all", "reference": "base"}, {}]
)
def test_a_dense_weight_that_would_be_infinite_is_refused_by_name(
    large, refused, value, key, settings
):
    put_everywhere(large, value)
    message = refused(large.config(**settings, **{key: "float16"}))
    assert message == (
        f"Error: {NAME}: its largest magnitude, 70000, becomes infinite in float16, which ends at 65504: "
        "set out_dtype to bfloat16 or float32 (--allow-nonfinite is for numbers that are infinite in the inputs)"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_a_wide_output_dtype_takes_large_weights(large, merged, read, dtype):
    put_everywhere(large, LARGE)
    out = merged(large.config(route="all", **({"out_dtype": dtype} if dtype else {})))
    assert float(read(out)[NAME][3, 4]) == pytest.approx(LARGE, rel=0.01)
    assert all(bool(weight.isfinite().all()) for weight in read(out).values())


def test_the_largest_weights_that_fit_are_rounded_as_ever(large, merged, read):
    put_everywhere(large, 65_519.0)
    dense = read(merged(large.config(route="none", out_dtype="float16")))[NAME]
    assert dense[3, 4] == 65_504


FORMS = {
    "exact": {"route": "all", "density": 0.5},
    "int8": {"route": "all", "density": 0.5, "values": "int8"},
    "exact, of the base": {"route": "all", "density": 0.5, "reference": "base"},
    "bits": {"route": "all", "bits": 4.0},
    "budget": {"budget": "4x"},
}


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_an_expert_whose_own_weight_would_be_infinite_is_refused_by_name(large, refused, settings):
    """Although its mean with the others is not."""
    path = put(large.experts["code"], LARGE)
    message = refused(large.config(out_dtype="float16", **settings))
    assert f"{NAME} of {path}: its largest magnitude, 70000, becomes infinite in float16" in message


def test_an_expert_of_an_averaged_layer_may_be_larger_than_the_mean(large, merged, read):
    put(large.experts["code"], LARGE)
    dense = read(merged(large.config(routed_layers="0", out_dtype="float16")))
    assert all(bool(weight.isfinite().all()) for weight in dense.values())


def test_an_adapter_that_makes_a_weight_infinite_is_refused_by_name(large, refused, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    models = []
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(large.base)
        settings = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(base, settings)
        if name == "code":
            with torch.no_grad():
                for key, weight in adapted.named_parameters():
                    if "layers.1" in key and "lora_" in key:
                        weight.mul_(1500)
        adapted.save_pretrained(tmp_path / name)
        models.append({"model": f"{large.base}+{tmp_path / name}"})
    config = large.config(models=models, route="all", reference="base", out_dtype="float16")
    message = refused(config)
    assert f"{NAME} of {models[1]['model']}: its largest magnitude, " in message
    assert "becomes infinite in float16" in message


def test_a_scaled_mean_that_would_be_infinite_is_refused(large, refused):
    message = refused(large.config(**{"route": "none", "lambda": 1e8, "out_dtype": "float16"}))
    assert "becomes infinite in float16, which ends at 65504" in message


def test_infinities_are_allowed_in_the_inputs_and_not_in_the_output(large, tmp_path):
    put(large.experts["math"], math.nan, place=(0, 0))
    put_everywhere(large, LARGE)
    config = MergeConfiguration.model_validate(large.config(route="none", out_dtype="float16"))
    with pytest.raises(InputError, match=f"{NAME}: its largest magnitude, 70000, becomes infinite"):
        merge.run(config, str(tmp_path / "out"), MergeOptions(quiet=True), allow_nonfinite=True)
    assert not (tmp_path / "out").exists()


def test_infinities_of_the_inputs_that_are_allowed_are_kept(large, tmp_path, read):
    put_everywhere(large, math.inf)
    settings = {"route": "all", "density": 1.0, "reference": "base", "out_dtype": "float16"}
    config = MergeConfiguration.model_validate(large.config(**settings))
    merge.run(config, str(tmp_path / "out"), MergeOptions(quiet=True), allow_nonfinite=True)
    assert read(tmp_path / "out")[NAME][3, 4] == math.inf
    MediatorModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("settings", [{}, {"out_dtype": "float32"}, {"out_dtype": "float64"}])
def test_a_weight_beyond_float32_is_refused_by_name(large, refused, settings):
    path = put(large.experts["math"], 1e300, dtype=torch.float64)
    message = refused(large.config(**settings))
    assert message == (
        f"Error: {NAME} of {path}: magnitude 1e+300 is beyond float32, in which merges are computed: scale "
        "down the weights of the models"
    )


def test_a_change_beyond_float32_is_refused_instead_of_dropped(large, refused):
    put(large.base, 3e38)
    path = put(large.experts["code"], -3e38)
    message = refused(large.config(route="all"))
    assert f"{NAME}: the change in {path}: its merged value is beyond float32" in message


def test_a_mean_beyond_float32_is_refused(large, refused):
    for path in large.experts.values():
        put(path, 2e38)
    put(large.base, 0.0)
    assert f"{NAME}: its merged value is beyond float32" in refused(large.config(route="none"))


@pytest.mark.parametrize("key", ["out_dtype", "dtype"])
def test_the_dense_method_refuses_a_weight_that_would_be_infinite(large, refused, key):
    put_everywhere(large, LARGE)
    message = refused(large.config("mediator_dense", weight=1.0, **{key: "float16"}))
    where = f"{NAME}: " if key == "out_dtype" else f"{NAME} of "
    assert message.startswith(f"Error: {where}")
    assert "its largest magnitude, 70000, becomes infinite in float16" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32", "out_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"out_dtype": "float16"},
        {"dtype": "float32", "tokenizer": {"source": "union"}},
        {"dtype": "float16", "out_dtype": "float32"},
    ],
    ids=str,
)
def test_the_dense_method_rounds_as_mergekit_does(large, merged, read, settings, monkeypatch):
    """Bit for bit as with mergekit's own planner, which rounds inputs as it reads them."""
    import mergekit.merge
    from mergekit.plan import MergePlanner

    config = large.config("mediator_dense", weight=1.0, **settings)
    ours = read(merged(config, name="ours"))
    monkeypatch.setattr(mergekit.merge, "MergePlanner", MergePlanner)
    stock = read(merged(config, name="stock"))
    assert ours.keys() == stock.keys()
    for name, weight in stock.items():
        assert ours[name].dtype == weight.dtype
        assert torch.equal(ours[name], weight), name


def test_other_methods_round_where_mergekit_does(large, merged, read):
    put_everywhere(large, LARGE)
    config = {**large.config("mediator_dense", out_dtype="float16", weight=1.0)}
    config["merge_method"] = "linear"
    assert read(merged(config))[NAME][3, 4] == math.inf


def test_the_dense_method_refuses_such_a_weight_in_memory():
    base, expert = ({"w": torch.tensor([1.0, value])} for value in (0.0, LARGE))
    arguments = {"base": "base", "parameters": {"weight": 1.0}}
    models = {"base": base, "a": expert}
    for options in ({"out_dtype": torch.float16}, {"dtype": torch.float16}):
        with pytest.raises(
            InputError, match=r"w.*: its largest magnitude, 70000, becomes infinite"
        ):
            mergekit.merge_methods.merge_state_dicts(
                models, "mediator_dense", **arguments, **options
            )
    merged = mergekit.merge_methods.merge_state_dicts(models, "mediator_dense", **arguments)
    assert merged["w"].tolist() == [1.0, LARGE]


VALUES = st.floats(width=32) | st.sampled_from([65_504.0, 65_519.0, 65_520.0, 3.4e38, -3.4e38])


@given(
    st.lists(VALUES, max_size=6), st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
)
def test_lost_magnitude_is_the_largest_finite_number_that_becomes_infinite(values, dtype):
    weight = torch.tensor(values, dtype=torch.float32)
    infinite = weight.to(dtype).isinf() & weight.isfinite()
    assert lost_magnitude(weight, dtype) == max(weight[infinite].abs().tolist(), default=0.0)
    if infinite.any():
        with pytest.raises(InputError, match="here: "):
            narrowed(weight, dtype, "here")
    else:
        assert torch.equal(narrowed(weight, dtype, "here").isnan(), weight.isnan())
        check_range(weight, dtype, "here")


def test_a_number_that_bfloat16_cannot_hold_asks_for_float32():
    with pytest.raises(InputError, match=r"infinite in bfloat16, .*: set out_dtype to float32 \("):
        check_range(torch.tensor([3.4e38]), torch.bfloat16, "here")
