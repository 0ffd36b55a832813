"""Publishing: whatever stops it, the output is the old model or the new one, and the user's files are there."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from faults import contents, faults, in_child
from outputs import CASES, TIME, Output, by, publish

from mergekit_mediator.errors import OutputError
from mergekit_mediator.store import durable
from mergekit_mediator.store import manifest as artifact
from mergekit_mediator.store.digests import digests
from mergekit_mediator.store.manifest import EVALUATION, PICTURES, read_manifest
from mergekit_mediator.store.staging import Staging
from mergekit_mediator.store.verification import verify_files


@pytest.fixture(scope="module")
def new(family, tmp_path_factory):
    return merged(family, tmp_path_factory.mktemp("new") / "out", density=0.5)


@pytest.fixture(scope="module")
def old(family, tmp_path_factory):
    """Another artifact of the same models, with a file that the new one has no use for."""
    out = merged(family, tmp_path_factory.mktemp("old") / "out", density=0.25)
    (out / "chat_template.json").write_text("{}")
    manifest = read_manifest(out)
    more = digests(out, ["chat_template.json"])
    artifact.write_manifest(out, manifest.model_copy(update={"files": {**manifest.files, **more}}))
    return out


def merged(family, out, **settings):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    config = MergeConfiguration.model_validate(family.config(route="all", **settings))
    run(config, str(out), MergeOptions(quiet=True))
    return out


@pytest.fixture
def make_output(tmp_path, old, family):
    return lambda kind: Output(tmp_path, kind, old, family.base)


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_an_output_is_replaced_and_the_users_files_stay(make_output, new, way, kind):
    output = make_output(kind)
    with by(way, output):
        publish(new, output.path)
    assert output.state(new) == "new"
    assert output.leftovers() == []


STOPPED = [
    ("exchange", "new"),
    ("exchange", "artifact"),
    ("exchange", "link"),
    ("in place", "plain"),
    ("inside", "artifact"),
    ("inside", "empty"),
]


def spread(new, output, count):
    """Some of the steps that publishing takes, from the first to the last one."""
    with faults() as steps:
        publish(new, output.path)
    output.restore()
    return sorted({1 + i * (steps.taken - 1) // (count - 1) for i in range(count)})


@pytest.mark.parametrize(("way", "kind"), STOPPED)
def test_a_kill_leaves_the_old_model_or_the_new_one_and_a_rerun_needs_no_cleaning(
    make_output, new, way, kind
):
    output = make_output(kind)
    with by(way, output):
        for at in spread(new, output, 6):

            def killed(at=at):
                with faults(at, "kill"):
                    publish(new, output.path)

            assert in_child(killed) == -9
            assert output.state(new) in ("old", "new") or way != "exchange"
            publish(new, output.path)
            assert output.state(new) == "new"
            assert output.leftovers() == []
            output.restore()


def fails(new, output, at, fault, lasting=False):
    """Whether publishing fails, if one of its steps does."""
    with faults(at, fault, lasting):
        try:
            publish(new, output.path)
        except (OSError, OutputError, KeyboardInterrupt):
            return True
    return False


@pytest.mark.parametrize("first", [0.6, 0.8])
def test_a_kill_while_an_earlier_one_is_undone_is_undone_too(make_output, new, first):
    output = make_output("artifact")
    with by("inside", output):
        count = spread(new, output, 2)[-1]
        for second in range(1, 40, 4):
            for at in (int(first * count), second):

                def killed(at=at):
                    with faults(at, "kill"):
                        publish(new, output.path)

                assert in_child(killed) == -9
                output.state(new)
            publish(new, output.path)
            assert output.state(new) == "new"
            assert output.leftovers() == []
            output.restore()


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "interrupt"])
@pytest.mark.parametrize(("way", "kind"), STOPPED)
def test_a_failed_step_leaves_the_old_model_or_the_new_one(make_output, new, way, kind, fault):
    output = make_output(kind)
    with by(way, output):
        for at in spread(new, output, 5):
            failed = fails(new, output, at, fault)
            assert output.state(new) in (("old", "new") if failed else ("new",))
            publish(new, output.path)
            assert output.state(new) == "new"
            assert output.leftovers() == []
            output.restore()


def test_the_next_merge_repairs_an_output_whose_disk_became_read_only(make_output, new):
    output = make_output("artifact")
    with by("inside", output):
        for at in spread(new, output, 8):
            failed = fails(new, output, at, "EROFS", lasting=True)
            assert output.state(new) == "new" or failed
            publish(new, output.path)
            assert output.state(new) == "new"
            assert output.leftovers() == []
            output.restore()


def test_files_that_the_user_adds_meanwhile_stay(make_output, new, monkeypatch):
    output = make_output("artifact")
    stock = durable.exchange

    def exchange(staged, out):
        (output.path / "runs" / "late.txt").write_text("late")
        stock(staged, out)

    monkeypatch.setattr(durable, "exchange", exchange)
    with Staging(output.path, overwrite=True) as staging:
        shutil.copytree(new, staging.path, dirs_exist_ok=True)
        (output.path / "early.txt").write_text("early")
        staging.publish(read_manifest(new))
    assert (output.path / "early.txt").read_text() == "early"
    assert (output.path / "runs" / "late.txt").read_text() == "late"
    verify_files(output.path, read_manifest(output.path))
    assert output.leftovers() == []


def test_files_that_can_have_no_second_name_are_moved_in_place(make_output, new, monkeypatch):
    output = make_output("artifact")

    def link(source, target, **_):
        raise PermissionError(errno.EPERM, "Operation not permitted", source)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with Staging(output.path, overwrite=True) as staging:
            shutil.copytree(new, staging.path, dirs_exist_ok=True)
            staging.publish(read_manifest(new))
    assert output.state(new) == "new"
    assert output.leftovers() == []


def test_a_directory_keeps_its_rights_and_its_age(make_output, new):
    output = make_output("artifact")
    output.path.chmod(0o750)
    os.utime(output.path / "empty", (TIME, TIME))
    (output.path / "empty").chmod(0o500)
    publish(new, output.path)
    assert output.path.stat().st_mode & 0o777 == 0o750
    assert (output.path / "empty").stat().st_mode & 0o777 == 0o500
    assert (output.path / "empty").stat().st_mtime == TIME


def test_a_new_directory_has_the_rights_of_any_new_directory(make_output, new):
    output = make_output("new")
    publish(new, output.path)
    (output.path.parent / "other").mkdir()
    assert output.path.stat().st_mode == (output.path.parent / "other").stat().st_mode


@pytest.mark.parametrize("at_mount", [False, True])
def test_where_nothing_can_be_written_beside_the_output_all_is_inside(
    make_output, new, monkeypatch, at_mount
):
    output = make_output("artifact")
    stock_open, stock_mkdir = os.open, os.mkdir

    def refuse(path):
        if Path(path).parent == output.path.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def open_(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            refuse(path)
        return stock_open(path, flags, *arguments, **options)

    def mkdir(path, *arguments, **options):
        refuse(path)
        stock_mkdir(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        patch.setattr(os, "mkdir", mkdir)
        if at_mount:
            patch.setattr(os.path, "ismount", lambda path: Path(path) == output.path)
        publish(new, output.path)
        with pytest.raises(OutputError, match=r"other: cannot be written in .*Permission denied"):
            publish(new, output.path.with_name("other"))
    assert output.state(new) == "new"
    assert output.leftovers() == []


def test_a_mount_point_that_is_none_to_python_is_published_inside(make_output, new, monkeypatch):
    """As where a directory of the same file system is bound to another place."""
    output = make_output("artifact")
    stock = os.rename

    def rename(source, target):
        if Path(source).is_relative_to(output.path) != Path(target).is_relative_to(output.path):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        stock(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        publish(new, output.path)
    assert output.state(new) == "new"
    assert output.leftovers() == []


@pytest.mark.parametrize("way", ["exchange", "inside"])
def test_a_link_in_the_place_of_a_folder_goes_and_its_target_stays(make_output, new, tmp_path, way):
    output = make_output("plain")
    elsewhere = shutil.copytree(new / "mediator", tmp_path / "elsewhere")
    before = contents(elsewhere)
    shutil.rmtree(output.path / "mediator")
    (output.path / "mediator").symlink_to(elsewhere)
    with by(way, output):
        for at in range(1, 200, 9):
            if not fails(new, output, at, "interrupt"):
                break
            assert contents(elsewhere) == before
        publish(new, output.path)
    assert at > 50
    verify_files(output.path, read_manifest(output.path))
    assert not (output.path / "mediator").is_symlink()
    assert contents(elsewhere) == before


def test_weights_that_others_share_by_a_second_name_stay_as_they_are(family, new, tmp_path):
    before = contents(family.base)
    shutil.copytree(family.base, tmp_path / "out", copy_function=os.link)
    publish(new, tmp_path / "out")
    assert contents(family.base) == before


def test_a_readme_of_the_user_stays_and_a_card_of_a_merge_is_replaced(make_output, new, capsys):
    output = make_output("mine")
    (output.path / "README.md").write_text("# Mine\n")
    publish(new, output.path)
    assert (output.path / "README.md").read_text() == "# Mine\n"
    assert "README.md stays: no model card is written" in capsys.readouterr().out
    (output.path / "README.md").write_text("---\ntags: [mergekit, merge]\n---\n# Old\n")
    publish(new, output.path)
    assert (output.path / "README.md").read_text() == (new / "README.md").read_text()


def test_results_and_pictures_go_with_the_model_that_they_describe(make_output, new):
    output = make_output("artifact")
    for name in (EVALUATION, *PICTURES, "mediator/notes.txt"):
        (output.path / name).write_text("old")
    publish(new, output.path)
    assert not [name for name in (EVALUATION, *PICTURES) if (output.path / name).exists()]
    assert (output.path / "mediator/notes.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["train.py", "embeddings.safetensors", "train.bin", "my.model"])
@pytest.mark.parametrize("kind", ["mine", "artifact"])
def test_files_that_loading_reads_and_that_may_be_the_users_are_refused_first(
    make_output, new, kind, name
):
    output = make_output(kind)
    (output.path / name).write_text("mine")
    with pytest.raises(
        OutputError, match=f"{name}: loading the model would read .* be yours: move it"
    ):
        publish(new, output.path)
    assert (output.path / name).read_text() == "mine"
    (output.path / name).unlink()
    assert output.state(new) == "old"
    assert output.leftovers() == []


def test_a_folder_with_the_name_of_a_file_is_refused(make_output, new):
    output = make_output("mine")
    (output.path / "config.json").mkdir()
    with pytest.raises(OutputError, match=r"out/config.json: has the name of a file of the model"):
        publish(new, output.path)
    assert output.leftovers() == []


def test_a_model_that_has_come_there_meanwhile_is_not_replaced(make_output, new, old):
    output = make_output("new")
    with Staging(output.path) as staging:
        shutil.copytree(new, staging.path, dirs_exist_ok=True)
        shutil.copytree(old, output.path)
        with pytest.raises(OutputError, match=": holds a model"):
            staging.publish(read_manifest(new))
    assert contents(output.path) == contents(old)


def test_directories_that_were_made_on_the_way_go_again(tmp_path):
    with Staging(tmp_path / "a" / "b" / "out") as staging:
        assert staging.path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_staging_directories_of_killed_processes_are_removed_and_no_others(tmp_path, new):
    out = tmp_path / "out"
    left = [".out.partial-0a1b", f".out.partial-{os.getpid()}"]
    others = [
        ".other.partial-0a1b",
        ".out.partial-0a.partial-0b",
        ".out.partial-x",
        "out.partial-0a",
    ]
    for name in (*left, *others):
        (tmp_path / name / "mediator").mkdir(parents=True)
    (tmp_path / ".out.mediator-lock").write_text("process 1")
    publish(new, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out"])


def test_a_staging_directory_of_another_user_moves_nothing(make_output, new, monkeypatch):
    output = make_output("new")
    left = output.path.with_name(".out.partial-0a1b")
    (left / ".replaced").mkdir(parents=True)
    for name in (".replaced/chat_template.json", "config.json"):
        (left / name).write_text("{}")
    moves = {"new": ["config.json"], "old": ["chat_template.json"]}
    (left / ".publishing.json").write_text(json.dumps(moves))
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    publish(new, output.path)
    assert output.state(new) == "new"
    assert output.leftovers() == [left.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"new": ["a"]}',
        '{"new": ["../x"], "old": []}',
        '{"new": ["a"], "old": ["/etc/x"]}',
        '{"new": [], "old": []}',
        '{"new": [1], "old": []}',
    ],
)
def test_a_damaged_list_of_moved_files_is_refused_by_name(make_output, new, text):
    output = make_output("artifact")
    left = output.path / ".partial-0a1b"
    left.mkdir()
    (left / ".publishing.json").write_text(text)
    with pytest.raises(OutputError, match=r"\.publishing\.json: a list of moved files required"):
        publish(new, output.path)
    shutil.rmtree(left)
    assert output.state(new) == "old"
