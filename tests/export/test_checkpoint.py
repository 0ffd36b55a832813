import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import ExportError
from mergekit_mediator.export.checkpoint import export_checkpoint
from mergekit_mediator.export.experts import StoredExperts

FORMS = (
    {"route": "all", "density": 0.3},
    {"route": "all", "density": 1.0, "values": "exact"},
    {"route": "all", "bits": 3},
    {"budget": "4x"},
)


@pytest.mark.parametrize("storage", FORMS, ids=str)
@pytest.mark.parametrize("mixture", [{"code": 1.0}, {"math": 0.25, "chat": 0.75}], ids=str)
def test_a_checkpoint_holds_the_bits_that_are_served(family, merged, tmp_path, storage, mixture):
    out = merged(family.config(**storage))
    size = export_checkpoint(StoredExperts(out), mixture, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    with MediatorModel.from_pretrained(out).mixture(mixture) as routed:
        served = routed.state_dict()
        assert plain.keys() == served.keys()
        assert all(torch.equal(weight, served[name]) for name, weight in plain.items())
    assert size == sum(path.stat().st_size for path in (tmp_path / "plain").iterdir())


def test_a_checkpoint_is_a_plain_model(family, merged, tmp_path):
    out = merged(family.config(route="all", density=0.3))
    export_checkpoint(StoredExperts(out), {"math": 1.0}, tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert not names & {
        "mediator",
        "custom_generate",
        "modeling_mediator.py",
        "mergekit_config.yml",
    }
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert type(trusted).__name__ == "LlamaForCausalLM"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out, tmp_path / "plain")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_a_checkpoint_in_several_files_keeps_its_files(family, merged, tmp_path):
    out = merged(family.config(route="all", density=0.3), "--out-shard-size", "9000")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    export_checkpoint(StoredExperts(out), {"math": 1.0}, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    with MediatorModel.from_pretrained(out).mixture("math") as routed:
        assert all(torch.equal(w, plain[n]) for n, w in routed.state_dict().items())


@pytest.mark.parametrize(
    ("mixture", "reference", "message"),
    [
        ({"law": 1.0}, "dense", "unknown expert 'law'; this artifact has math, code, chat"),
        ({"math": 1.0}, "base", "a checkpoint is made of the dense expert: relative to dense"),
    ],
)
def test_what_is_no_checkpoint_is_refused(family, merged, tmp_path, mixture, reference, message):
    experts = StoredExperts(merged(family.config(bits=3, route="all")), reference)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(experts, mixture, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_folder_that_is_not_empty_is_refused(family, merged, tmp_path):
    experts = StoredExperts(merged(family.config(route="all", density=0.3)))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/notes.txt").write_text("mine")
    with pytest.raises(
        ExportError, match="plain: an empty folder is required, it is not empty: choose"
    ):
        export_checkpoint(experts, {"math": 1.0}, tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["notes.txt"]
