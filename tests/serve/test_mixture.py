import pytest

from mergekit_mediator.errors import MixtureError
from mergekit_mediator.serve.mixture import DENSE, Mixture

EXPERTS = ("math", "code", "chat")


def test_a_name_stands_for_one_expert_alone():
    mixture = Mixture.of("code", EXPERTS)
    assert mixture.weights == (("code", 1.0),)
    assert mixture.alone == "code"


def test_weights_are_kept_in_the_order_of_the_artifact_without_zeros():
    mixture = Mixture.of({"chat": 0.75, "code": 0, "math": 0.5}, EXPERTS)
    assert mixture.weights == (("math", 0.5), ("chat", 0.75))
    assert (mixture.names, mixture.total, mixture.alone) == (("math", "chat"), 1.25, None)
    assert (mixture.weight("chat"), mixture.weight("code")) == (0.75, 0.0)
    assert "math" in mixture
    assert "code" not in mixture
    assert str(mixture) == "0.5 math + 0.75 chat"


def test_no_weights_and_the_name_dense_stand_for_the_dense_expert():
    assert Mixture.of({}, EXPERTS) == Mixture.of("dense", EXPERTS) == DENSE
    assert str(DENSE) == "the dense expert"
    assert Mixture.of("dense", ("dense", "math")).names == ("dense",)


def test_a_row_of_a_policy_is_a_mixture():
    assert Mixture.of_row([0.0, 0.25, 0.75], EXPERTS).weights == (("code", 0.25), ("chat", 0.75))


def test_a_mixture_stays_what_it_is():
    mixture = Mixture.of("math", EXPERTS)
    assert Mixture.of(mixture, EXPERTS) is mixture


@pytest.mark.parametrize("named", [3, None, ["math"]])
def test_values_that_name_no_mixture_are_refused_with_an_example(named):
    with pytest.raises(
        MixtureError, match=r"an expert's name or weights by expert are required, got .*'math': 1"
    ):
        Mixture.of(named, EXPERTS)


@pytest.mark.parametrize("weight", [True, "1", None, float("inf"), -1])
def test_a_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(MixtureError, match="expert 'math': weight must be"):
        Mixture.of({"math": weight}, EXPERTS)
