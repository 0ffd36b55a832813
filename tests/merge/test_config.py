import pytest
from mergekit.config import MergeConfiguration

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.layers import Selection

MODELS = [
    {"model": "org/math-7b", "parameters": {"expert": "math", "weight": 2.0}},
    {"model": "org/Code_7B"},
]


def parse(parameters=None, models=MODELS, **top):
    config = {"merge_method": "mediator", "base_model": "org/base", "models": models, **top}
    if parameters is not None:
        config["parameters"] = parameters
    return MediatorConfig.from_merge_config(MergeConfiguration.model_validate(config))


def refused(parameters=None, **settings):
    with pytest.raises(ConfigError) as caught:
        parse(parameters, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_those_of_the_documentation():
    config = parse()
    assert (config.conflict, config.denoise, config.route) == ("mass", 0.2, "auto")
    assert (config.values, config.reference) == ("exact", "mean")
    assert (config.keep, config.selection) == (0.99, Selection("all"))


@pytest.mark.parametrize(
    "parameters",
    [
        {"route": "auto"},
        {"density": 0.1},
        {"values": "int8"},
        {"bits": 1},
        {"budget": "2x"},
        {"rank": 4},
        {"routed_layers": "1"},
        {"conflict": "sign"},
        {"denoise": 0.1},
        {"lambda": 0.5},
    ],
)
def test_keep_is_no_default_where_storage_or_layers_are_given(parameters):
    assert parse(parameters).keep is None


def test_one_expert_alone_keeps_99_percent_too():
    config = parse(models=MODELS[:1])
    assert (config.keep, config.reference, config.selection) == (0.99, "base", Selection("all"))


def test_a_budget_may_cap_keep():
    config = parse({"keep": 0.97, "budget": "1.1x"})
    assert (config.keep, config.budget, config.selection) == (0.97, "1.1x", Selection("all"))


def test_experts_are_named_by_the_configuration_or_by_their_path():
    assert list(parse().experts.values()) == ["math", "code_7b"]


def test_an_adapter_names_its_expert():
    assert list(parse(models=[{"model": "b+org/Sums!"}, {"model": "x"}]).experts.values()) == [
        "sums-",
        "x",
    ]


def test_the_base_model_may_be_listed_and_is_no_expert():
    config = parse(models=[{"model": "org/base"}, *MODELS])
    assert list(config.experts.values()) == ["math", "code_7b"]


@pytest.mark.parametrize(
    ("parameters", "selection"),
    [
        ({"route": "all"}, Selection("all")),
        ({"route": "none"}, Selection("none")),
        ({"conflict_threshold": 0.35}, Selection("conflict_threshold", threshold=0.35)),
        ({"routed_fraction": 0.3}, Selection("routed_fraction", fraction=0.3)),
        (
            {"routed_fraction": 0.3, "conflict": "sign"},
            Selection("routed_fraction", fraction=0.3, by_conflict=True),
        ),
        ({"routed_layers": "0-3,30"}, Selection("routed_layers", layers="0-3,30")),
        ({"routed_layers": 3}, Selection("routed_layers", layers="3")),
    ],
)
def test_every_way_of_choosing_layers_is_understood(parameters, selection):
    assert parse(parameters).selection == selection


ADAPTERS = [{"model": f"org/base+org/{name}"} for name in "ab"]


def test_auto_routes_all_layers_of_adapters_which_keep_their_own_factors():
    assert parse(models=ADAPTERS).selection == Selection("all")
    assert parse({"route": "none"}, models=ADAPTERS).selection == Selection("none")
    assert parse({"routed_layers": "1"}, models=ADAPTERS).selection.layers == "1"


@pytest.mark.parametrize(
    ("parameters", "models"),
    [
        ({"density": 0.1}, ADAPTERS),
        ({"route": "auto"}, [*ADAPTERS, MODELS[1]]),
        ({"route": "auto"}, [ADAPTERS[0], {"model": "org/other+org/b"}]),
    ],
)
def test_auto_looks_at_conflict_where_experts_are_not_their_own_factors(parameters, models):
    assert parse(parameters, models=models).selection == Selection("auto")


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"densty": 0.1}, ["'densty'", "use one of", "density"]),
        ({"conflict": "cosine"}, ["conflict", "'sign'", "got 'cosine'"]),
        ({"values": "int2"}, ["values", "got 'int2'"]),
        ({"route": "some"}, ["route", "'auto'", "got 'some'"]),
        ({"reference": "median"}, ["reference", "got 'median'"]),
        ({"denoise": 0}, ["denoise", "greater than 0", "got 0"]),
        ({"denoise": 1.5}, ["denoise", "got 1.5"]),
        ({"denoise": "much"}, ["denoise", "got 'much'"]),
        ({"conflict_threshold": -0.1}, ["conflict_threshold", "got -0.1"]),
        ({"routed_fraction": 2}, ["routed_fraction", "got 2"]),
        ({"budget": "much"}, ["budget", "1.25x", "24GB", "'much'"]),
        ({"budget": 1.25}, ["budget: a multiple such as 1.25x", "got '1.25'"]),
        ({"bits": True}, ["bits", "a number or a name required, got True"]),
        ({"density": []}, ["density is an empty list"]),
        ({"budget": "1.25x", "density": 0.1}, ["budget and density contradict"]),
        ({"bits": 0.5, "values": "int8"}, ["bits and values contradict"]),
        ({"bits": 0}, ["bits", "greater than 0"]),
        ({"keep": 1}, ["keep: a number above 0 and below 1 required, such as 0.99", "got 1"]),
        ({"keep": 0}, ["keep: a number above 0 and below 1 required", "got 0"]),
        ({"keep": "most"}, ["keep", "valid number", "got 'most'"]),
        ({"keep": 0.9, "density": 0.1}, ["density and keep contradict"]),
        ({"keep": 0.9, "bits": 0.5}, ["bits and keep contradict"]),
        ({"keep": 0.9, "budget": "2x", "bits": 0.5}, ["bits and keep contradict"]),
        ({"keep": 0.9, "route": "auto"}, ["route and keep contradict"]),
        ({"expert": "math"}, ["'expert'", "one model's"]),
        ({"route": "all", "routed_fraction": 0.1}, ["route and routed_fraction contradict"]),
        ({"routed_layers": "1", "budget": "2x"}, ["routed_layers and budget contradict"]),
        ({"denoise": [0.1, 0.2]}, ["denoise", "neither a gradient nor a filter"]),
        ({"route": [{"filter": "mlp", "value": "all"}]}, ["route", "neither a gradient"]),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters, parts):
    message = refused(parameters)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("models", "parts"),
    [
        ([{"model": "org/base"}], ["at least one expert", "got 0"]),
        ([{"model": "a/x"}, {"model": "b/x"}], ["a/x and b/x", "'x'", "expert:"]),
        ([{"model": "a/x"}, {"model": "b/X"}], ["a/x and b/X", "'x'"]),
        (
            [{"model": "a", "parameters": {"expert": "Math"}}, {"model": "b"}],
            ["model a", "'Math'", "a-z 0-9 . _ -"],
        ),
        ([{"model": "a", "parameters": {"expert": "../x"}}, {"model": "b"}], ["'../x'"]),
        ([{"model": "a", "parameters": {"expert": "x" * 65}}, {"model": "b"}], ["1 to 64"]),
        ([{"model": "a", "parameters": {"name": "x"}}, {"model": "b"}], ["model a", "'name'"]),
        (
            [{"model": "a", "parameters": {"denoise": 0.1}}, {"model": "b"}],
            ["model a", "'denoise'", "top-level parameters"],
        ),
        (
            [{"model": "org/base", "parameters": {"weight": 1.0}}, *MODELS],
            ["org/base", "no parameters of its own"],
        ),
        ([{"model": "!!!"}, {"model": "b"}], ["model !!!", "expert: NAME"]),
    ],
)
def test_wrong_models_are_refused_by_name(models, parts):
    message = refused(models=models)
    assert all(part in message for part in parts), message


def test_the_same_model_twice_is_refused():
    named = [{"model": "org/x", "parameters": {"expert": name}} for name in "ab"]
    assert "org/x is listed twice" in refused(models=named)


def test_one_expert_of_two_names_is_refused():
    slices = [
        {
            "sources": [
                {"model": m, "layer_range": [i, i + 1], "parameters": {"expert": f"{m}{i}"}}
                for m in "ab"
            ]
        }
        for i in range(2)
    ]
    assert "model a: expert is both 'a0' and 'a1'" in refused(models=None, slices=slices)


def test_a_missing_base_is_refused():
    assert "base_model" in refused(base_model=None)


def test_parameters_of_the_whole_merge_may_not_stand_in_a_slice():
    sources = [{"model": m, "layer_range": [0, 2]} for m in ("org/base", "a", "b")]
    message = refused(models=None, slices=[{"sources": sources, "parameters": {"values": "int8"}}])
    assert "slices[0].parameters" in message
    assert "'values'" in message


def test_gradients_and_filters_are_left_to_mergekit_where_they_have_a_meaning():
    parse({"density": [0.1, 0.5], "weight": [{"filter": "mlp", "value": 2.0}], "lambda": [0, 1]})


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), "dense", True])
def test_a_density_outside_its_range_is_refused(density):
    assert "parameters: density must be a number in (0, 1], got" in refused({"density": density})


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan"), "much"])
def test_a_weight_that_is_no_share_is_refused(weight):
    assert "weight must be a finite number of at least 0" in refused({"weight": weight})


@pytest.mark.parametrize(
    "setting",
    [
        [0.1, 2.0],
        {"value": 2.0},
        [{"filter": "mlp", "value": 2.0}, {"value": 0.1}],
        [{"filter": "mlp", "value": [0.1, 2.0]}],
    ],
)
def test_every_number_of_a_gradient_or_filter_is_checked(setting):
    models = [{"model": "a", "parameters": {"density": setting}}, {"model": "b"}]
    assert "model a: density must be a number in (0, 1], got 2.0" in refused(models=models)


def test_lambda_holds_for_all_experts():
    models = [{"model": "a", "parameters": {"lambda": 0.5}}, {"model": "b"}]
    assert "model a: 'lambda' holds for all experts" in refused(models=models)


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        parse().conflict = "mass"
