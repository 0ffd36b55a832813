import shutil

import edits
import pytest
import torch
from commands import call

from mergekit_mediator.errors import EditError
from mergekit_mediator.merge.editing.add import add_expert
from mergekit_mediator.merge.editing.rebuild import rebuild_without
from mergekit_mediator.merge.editing.rename import rename_expert
from mergekit_mediator.store.manifest import read_manifest


def test_a_rebuild_is_the_merge_of_the_others(fresh, family, tmp_path, read):
    out = fresh("averaged")
    rename_expert(out, "chat", "talk")
    result = call("remove-expert", out, "code", "--rebuild")
    assert result.exit_code == 0, result.output
    assert "the other models were merged again: nothing holds it" in result.output
    manifest = edits.check(out, ("math", "talk"))
    assert [change.action for change in manifest.history] == ["rename", "rebuild"]
    others = {"math": family.experts["math"], "chat": family.experts["chat"]}
    merged = edits.build(
        tmp_path / "two", type(family)(family.base, others), **edits.FORMS["averaged"]
    )
    want, got = read(merged), read(out)
    assert all(torch.equal(got[name], weight) for name, weight in want.items())
    assert "nothing holds it" in (out / "README.md").read_text()


def test_an_added_expert_takes_part_in_the_rebuilt_average(fresh, family, tmp_path, read):
    out = fresh("density")
    law = edits.one_more(family, tmp_path)
    add_expert(out, str(law), "law")
    rebuild_without(out, "math")
    manifest = edits.check(out, ("code", "chat", "law"))
    assert [e.weight for e in manifest.experts] == [1.0, 1.0, 1.0]
    models = [read(p) for p in (family.experts["code"], family.experts["chat"], law)]
    for name, weight in read(out).items():
        mean = sum(model[name].float() for model in models) / 3
        assert torch.allclose(weight.float(), mean, rtol=2**-6, atol=2**-8), name


def test_models_that_are_gone_are_named_in_one_line_and_nothing_changes(make, tmp_path):
    family = make()
    out = edits.build(tmp_path / "out", family, density=0.5)
    before = read_manifest(out)
    shutil.rmtree(family.experts["chat"])
    with pytest.raises(EditError, match=r"chat: is not on this machine, and a rebuild reads all"):
        rebuild_without(out, "math")
    with pytest.raises(EditError, match="has no expert 'law': name one of math, code, chat"):
        rebuild_without(out, "law")
    assert edits.check(out, edits.NAMES) == before
    rebuild_without(out, "chat")
    edits.check(out, ("math", "code"))


def test_the_base_option_belongs_to_a_rebuild(fresh, family):
    result = call("remove-expert", fresh("density"), "math", "--base", family.base)
    assert result.exit_code == 2
    assert "--base is read with --rebuild alone" in result.output
