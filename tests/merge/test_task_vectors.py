"""The methods of task vectors through mergekit-yaml: the same weights as in memory, and errors before any is read."""

import mergekit.io.tasks
import mergekit.merge_methods
import pico
import pytest
import torch
from mergekit.merge_methods import merge_state_dicts

from mergekit_mediator.methods.data_free import DATA_FREE
from mergekit_mediator.methods.whole_model import WholeModelMethod

NAMES = [method.spec.name for method in DATA_FREE]
WHOLE = [method.spec.name for method in DATA_FREE if issubclass(method, WholeModelMethod)]

every_method = pytest.mark.parametrize("method", NAMES)


@pytest.fixture
def unread(monkeypatch):
    """Fails the test if a weight is read."""

    def execute(self):
        raise AssertionError(f"{self.tensor} was read")

    monkeypatch.setattr(mergekit.io.tasks.LoadTensor, "execute", execute)


def in_memory(family, read, method, **parameters):
    models = [read(path) for path in (family.base, *family.experts.values())]
    return merge_state_dicts(models, method, base=0, parameters=parameters)


@every_method
def test_the_command_writes_what_a_merge_in_memory_gives(method, family, merged, read):
    written = read(merged(family.config(method)))
    expected = in_memory(family, read, method)
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert written[name].dtype == torch.bfloat16
        torch.testing.assert_close(written[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("method", WHOLE)
def test_a_tied_weight_is_measured_and_written_once(method, make, merged, read):
    family = make(pico.llama_tied)
    for directory in (family.base, *family.experts.values()):
        assert "lm_head.weight" not in read(directory)
    written = read(merged(family.config(method)))
    expected = in_memory(family, read, method)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["tsvm", "pcb"])
def test_vocabularies_are_aligned_before_figures_are_measured(method, family, merged, read):
    config = family.config(method, tokenizer={"source": "union"})
    written = read(merged(config))
    assert written["model.embed_tokens.weight"].shape[0] == pico.VOCABULARY
    assert all(weight.isfinite().all() for weight in written.values())


@every_method
def test_a_filter_gives_a_part_of_the_model_a_lambda_of_its_own(method, family, merged, read):
    settings = [{"filter": "self_attn", "value": 0.0}, {"value": 1.0}]
    written = read(merged(family.config(method, **{"lambda": settings})))
    base, whole = read(family.base), in_memory(family, read, method)
    for name, weight in written.items():
        assert torch.equal(weight, (base if "self_attn" in name else whole)[name]), name


@every_method
@pytest.mark.usefixtures("unread")
def test_an_unknown_parameter_is_refused_unread(method, family, refused):
    message = refused(family.config(method, lamda=1.0))
    assert "parameters: unknown parameter 'lamda'; known are" in message


@every_method
@pytest.mark.usefixtures("unread")
def test_a_value_that_is_no_number_is_refused_unread(method, family, refused):
    message = refused(family.config(method, **{"lambda": "much"}))
    assert "parameters: lambda: Input should be a valid number" in message
    assert "got 'much'" in message


@every_method
@pytest.mark.usefixtures("unread")
def test_a_missing_base_model_is_refused_unread(method, family, refused):
    config = family.config(method)
    del config["base_model"]
    assert f"base_model: required by merge_method: {method}" in refused(config)


@pytest.mark.usefixtures("unread")
def test_a_parameter_of_all_experts_beside_one_model_is_refused(family, refused):
    config = family.config("tsvm")
    config["models"][0]["parameters"] = {"rank": 3}
    assert "'rank' holds for all experts: put it top level" in refused(config)


@pytest.mark.usefixtures("unread")
def test_a_rank_above_the_smaller_side_is_refused_unread(family, refused):
    message = refused(family.config("tsvm", rank=9))
    assert "rank: at most 8 required" in message
    assert "self_attn.k_proj.weight [8, 16], got 9" in message


def test_a_rank_with_a_filter_fits_each_weight(family, merged):
    settings = [{"filter": "k_proj", "value": 8}, {"filter": "v_proj", "value": 8}, {"value": 16}]
    merged(family.config("tsvm", rank=settings))


@pytest.mark.usefixtures("unread")
def test_opcm_refuses_weights_that_differ_unread(family, refused):
    config = family.config("opcm")
    config["models"][0]["parameters"] = {"weight": 0.5}
    message = refused(config)
    assert "weight: the same for all experts required" in message
    assert "got 0.5 and 1.0" in message


@pytest.mark.parametrize("method", ["doge", "localize_and_stitch", "pcb"])
@pytest.mark.usefixtures("unread")
def test_a_density_of_the_whole_model_that_varies_is_refused_unread(method, family, refused):
    message = refused(family.config(method, density=[0.1, 0.2]))
    assert "density: one value required" in message


@pytest.mark.parametrize("method", WHOLE)
def test_a_merge_weight_by_weight_without_figures_is_refused(method):
    kind = next(kind for kind in DATA_FREE if kind.spec.name == method)
    tensors = [torch.ones(2, 2) * i for i in range(3)]
    group = mergekit.merge_methods.TensorGroup.from_tensors(tensors, base_index=0)
    with pytest.raises(Exception, match="figures of the whole model required"):
        kind().merge_group(group, weight={1: 1.0, 2: 1.0}, **{"lambda": 1.0})


def test_opcm_leaves_nothing_in_the_temporary_folder(family, merged, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    merged(family.config("opcm"))
    assert not list(scratch.glob("mergekit-mediator-*"))
