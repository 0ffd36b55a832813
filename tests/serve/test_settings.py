import pytest

from mergekit_mediator.errors import SettingError
from mergekit_mediator.serve.settings import Settings


def test_a_setting_of_a_model_is_an_attribute_of_it(model):
    model.policy = "soft"
    assert model.settings.policy == "soft"
    model.settings.ood_action = "dense"
    assert model.ood_action == "dense"


def test_a_misspelt_setting_is_an_error_that_names_the_right_one(model):
    with pytest.raises(SettingError, match=r"unknown setting 'polcy': did you mean 'policy.\?"):
        model.polcy = "soft"
    with pytest.raises(SettingError, match="unknown setting 'polcy'"):
        model.settings.polcy = "soft"


def test_a_name_that_is_near_none_is_answered_with_all_settings():
    with pytest.raises(
        SettingError, match="unknown setting 'x': the settings are policy, entropy_threshold"
    ):
        Settings().x = 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("policy", "sotf", "policy: input should be 'hard', 'soft' or 'auto', got 'sotf'"),
        ("entropy_threshold", 1.5, "entropy_threshold: input should be less than or equal to 1"),
        ("ood_action", None, "ood_action: input should be 'blend'"),
        ("apply", "row", "apply: input should be 'auto', 'merge' or 'rows', got 'row'"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_refused_when_it_is_set(name, value, message):
    settings = Settings()
    with pytest.raises(SettingError, match=message):
        setattr(settings, name, value)
    assert settings == Settings()
