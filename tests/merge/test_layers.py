import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.conflict import Conflict
from mergekit_mediator.merge.layers import LayerPlan, Selection, parse_layers, select_routed

LAYERS = ["embed", "0", "1", "2", "3", "final"]
CONFLICT = dict(zip(LAYERS, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], strict=True))
PROFILES = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(
    lambda values: {f"layer {i}": value for i, value in enumerate(values)}
)


def test_all_routes_every_layer_without_conflict():
    assert select_routed(LAYERS, Selection("all"), {}) == set(LAYERS)


def test_none_routes_no_layer():
    assert select_routed(LAYERS, Selection("none"), {}) == set()


def test_auto_routes_the_layers_above_the_mean():
    assert select_routed(LAYERS, Selection("auto"), CONFLICT) == {"2", "3", "final"}


def test_auto_routes_nothing_where_all_layers_conflict_alike():
    assert select_routed(LAYERS, Selection("auto"), dict.fromkeys(LAYERS, 0.5)) == set()


@given(PROFILES)
@example(dict.fromkeys(["0", "1", "2"], 8.918776044469711e-110))
def test_auto_never_prefers_a_layer_of_less_conflict(profile):
    routed = select_routed(list(profile), Selection("auto"), profile)
    averaged = set(profile) - routed
    assert len(averaged) > 0
    if routed:
        assert min(profile[n] for n in routed) > max(profile[n] for n in averaged)


@given(PROFILES, st.floats(0, 1))
def test_a_threshold_routes_the_layers_above_it(profile, threshold):
    selection = Selection("conflict_threshold", threshold=threshold)
    routed = select_routed(list(profile), selection, profile)
    assert routed == {name for name, value in profile.items() if value > threshold}


@given(PROFILES, st.floats(0, 1))
def test_a_fraction_routes_that_many_layers_of_most_conflict(profile, fraction):
    selection = Selection("routed_fraction", fraction=fraction, by_conflict=True)
    routed = select_routed(list(profile), selection, profile)
    assert len(routed) == round(fraction * len(profile))
    rest = [value for name, value in profile.items() if name not in routed]
    assert all(profile[n] >= value for n in routed for value in rest)


@pytest.mark.parametrize(
    ("fraction", "routed"),
    [(0, set()), (0.3, {"1", "2"}), (0.5, {"0", "1", "2"}), (0.7, {"0", "1", "2", "3"})],
)
def test_a_fraction_is_of_the_layers_nearest_the_middle_unless_conflict_decides(fraction, routed):
    selection = Selection("routed_fraction", fraction=fraction)
    assert select_routed(LAYERS, selection, {}) == routed
    assert not selection.needs_conflict


def test_each_module_has_a_middle_of_its_own():
    layers = ["text.embed", *(f"text.{i}" for i in range(5)), *(f"vision.{i}" for i in range(3))]
    selection = Selection("routed_fraction", fraction=2 / 9)
    assert select_routed(layers, selection, {}) == {"text.2", "vision.1"}


def test_explicit_layers_may_be_names_and_ranges():
    assert parse_layers("embed, 0-2,final", LAYERS) == {"embed", "0", "1", "2", "final"}


def test_layers_of_several_modules_are_named_with_their_module():
    layers = ["text.embed", "text.0", "text.1", "vision.0"]
    assert parse_layers("text.0-1", layers) == {"text.0", "text.1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "'7' is not in this model, whose layers are embed, 0-3, final"),
        ("2-9", "'2-9' is not in this model"),
        ("head", "'head' is not in this model"),
        ("", "'' is not in this model"),
        ("3-1", "range '3-1' runs backwards"),
    ],
)
def test_layers_that_are_not_there_are_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layers(text, LAYERS)


def test_only_rules_that_look_at_conflict_need_it():
    rules = ("auto", "all", "none", "conflict_threshold", "routed_fraction", "routed_layers")
    needing = {rule for rule in rules if Selection(rule).needs_conflict}
    assert needing == {"auto", "conflict_threshold"}
    assert Selection("routed_fraction", by_conflict=True).needs_conflict


def test_a_layer_shows_the_metrics_that_were_measured():
    measured = LayerPlan("0", ("w",), Conflict(2, 1, 4.0, 3.0, 4.0, 1.0, has_sign=True))
    assert measured.metrics == {"sign": 0.5, "mass": 0.25, "dispersion": 0.75}
    without = LayerPlan("0", ("w",), Conflict(0, 0, 4.0, 3.0, 4.0, 1.0))
    assert without.metrics == {"mass": 0.25, "dispersion": 0.75}
    assert LayerPlan("0", ("w",)).metrics == {}


def test_a_layer_has_the_sign_of_those_of_its_weights_that_have_one():
    buffer, weight = Conflict(), Conflict(2, 1, has_sign=True)
    assert (buffer + weight).metrics["sign"] == (weight + buffer).metrics["sign"] == 0.5
