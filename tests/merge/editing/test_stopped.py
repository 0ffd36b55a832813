"""A change that is stopped at any step leaves the old or the new artifact."""

import shutil
from unittest import mock

import edits
import pytest
from faults import contents, faults, in_child, leftovers
from outputs import refuse_to_load

from mergekit_mediator.errors import EditError, OutputError
from mergekit_mediator.merge.editing.add import add_expert
from mergekit_mediator.merge.editing.remove import remove_expert
from mergekit_mediator.merge.editing.rename import rename_expert
from mergekit_mediator.merge.editing.requantize import requantize
from mergekit_mediator.store.output_lock import output_lock


@pytest.fixture(scope="module")
def law(family, tmp_path_factory):
    return edits.one_more(family, tmp_path_factory.mktemp("law"))


# By change: the call, and how many steps apart it is stopped.
CHANGES = {
    "rename": (lambda out, law: rename_expert(out, "math", "algebra"), 9),
    "remove": (lambda out, law: remove_expert(out, "math"), 15),
    "requantize": (lambda out, law: requantize(out, bits=2), 47),
    "add": (lambda out, law: add_expert(out, str(law), "law"), 61),
}


def outcome(source, folder, change):
    """The content of an artifact after a change, and the number of the steps that the change takes in a child.

    The first change in this process may take steps that no later one takes: it lets go of what earlier tests left.
    """
    change(edits.copied(source, folder / "first" / "out"))
    out, count = edits.copied(source, folder / "whole" / "out"), folder / "count"

    def counted():
        with faults() as steps:
            change(out)
        count.write_text(str(steps.taken))

    assert in_child(counted) == 0
    return contents(out), int(count.read_text())


@pytest.mark.parametrize("kind", CHANGES)
def test_a_kill_leaves_the_old_or_the_new_artifact(artifacts, law, tmp_path, kind):
    call, apart = CHANGES[kind]
    source = artifacts("bits")
    after, count = outcome(source, tmp_path, lambda out: call(out, law))
    seen = set()
    for at in [*range(1, count - 5, apart), *range(count - 5, count + 1)]:
        out = edits.copied(source, tmp_path / "work" / "out")

        def killed(at=at, out=out):
            with faults(at, "kill"):
                call(out, law)

        assert in_child(killed) == -9
        now = contents(out)
        assert now in (contents(source), after), at
        seen.add(now == after)
        rename_expert(out, "chat", "talk")  # the next change removes what the killed one left
        assert leftovers(out) == []
        shutil.rmtree(tmp_path / "work")
    assert seen == {False, True}


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fault", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("kind", ["rename", "requantize"])
def test_a_step_that_fails_ends_in_one_line(artifacts, law, tmp_path, kind, fault, lasting):
    call, apart = CHANGES[kind]
    source = artifacts("bits")
    after, count = outcome(source, tmp_path, lambda out: call(out, law))
    for at in range(1 + lasting, count + 1, 2 * apart):
        out = edits.copied(source, tmp_path / "work" / "out")
        error = ""
        try:
            with faults(at, fault, lasting):
                call(out, law)
        except OutputError as raised:
            error = str(raised)
        assert "\n" not in error
        assert contents(out) in ((contents(source), after) if error else (after,)), (at, error)
        shutil.rmtree(tmp_path / "work")


def test_where_directories_cannot_be_exchanged_the_next_change_puts_the_old_one_back(
    artifacts, law, tmp_path
):
    source, states = artifacts("base"), set()
    with mock.patch("mergekit_mediator.store.durable.can_exchange", return_value=False):
        after, count = outcome(source, tmp_path, lambda out: rename_expert(out, "math", "algebra"))
        for at in range(1, count + 1, 7):
            out = edits.copied(source, tmp_path / "work" / "out")

            def killed(at=at, out=out):
                with faults(at, "kill"):
                    rename_expert(out, "math", "algebra")

            assert in_child(killed) == -9
            now = contents(out)
            state = "old" if now == contents(source) else "new" if now == after else "neither"
            states.add(state)
            if state == "neither":
                refuse_to_load(out)
            try:
                rename_expert(out, "math", "algebra")
            except EditError:
                assert state == "new"
            assert contents(out) == after
            shutil.rmtree(tmp_path / "work")
    assert "neither" in states


def test_two_changes_at_once_are_refused(fresh):
    out = fresh("density")
    with output_lock(out), pytest.raises(OutputError, match="writes there: wait until it ends"):
        rename_expert(out, "math", "algebra")
    edits.check(out, edits.NAMES)
