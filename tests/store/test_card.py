import pytest
import records
import yaml
from huggingface_hub import ModelCard
from records import manifest

from mergekit_mediator.errors import ArtifactError, OutputError
from mergekit_mediator.store.card import generated_part, refresh_card
from mergekit_mediator.store.digests import FileDigest
from mergekit_mediator.store.evaluation import Evaluation
from mergekit_mediator.store.manifest import PICTURES

EVALUATION = Evaluation.model_validate(records.evaluation())
HEADER = "---\n# ours\nlicense: mit\ntags: [merge]\n---\n"


@pytest.fixture
def root(tmp_path):
    """An artifact whose card has text of people above and below the generated part."""
    (tmp_path / "mediator").mkdir()
    card = f"{HEADER}# Mine\n\n{generated_part(manifest())}\n\nBelow.\n"
    (tmp_path / "README.md").write_text(card)
    return tmp_path


def refresh(root, evaluation=None, pictures=(), **changes):
    drawn = {name: name.encode() for name in pictures}
    return refresh_card(root, manifest(**changes), evaluation, lambda: drawn)


def card(root):
    return (root / "README.md").read_text()


def test_the_part_says_how_large_the_artifact_is_and_shows_conflict(root):
    assert "The dense expert takes 10.0 MB, the experts together 1.0 MB: all files" in card(root)
    assert "are 1.100 times the dense expert" in card(root)
    assert "0 0.500 ###############" in card(root)
    assert "The experts come back nearly, not exactly" in card(root)


@pytest.mark.parametrize(
    ("size", "text"), [(900, "0.9 kB"), (1_000_000, "1.0 MB"), (15_200_000_000, "15.2 GB")]
)
def test_sizes_have_a_fitting_unit(size, text):
    files = {**manifest().files, "model.safetensors": FileDigest(sha256="0" * 64, bytes=size)}
    assert f"The dense expert takes {text}, the" in generated_part(manifest(files=files))


def test_a_card_that_is_up_to_date_is_not_written(root):
    before = (root / "README.md").stat().st_mtime_ns
    assert refresh(root)
    assert (root / "README.md").stat().st_mtime_ns == before


def test_results_come_into_the_part_and_text_around_it_stays(root):
    assert refresh(root, EVALUATION)
    text = card(root)
    assert "| `mediator` | 93.8 | 87.5 | 1.050 | 50.0 | 87.5 |" in text
    assert "Alone it keeps 40% of the experts' exact match, and 30% on its worst task." in text
    assert "`math.jsonl` (8), `gym:codes` (8)" in text
    assert "\n---\n# Mine\n\n<!-- mergekit-mediator " in text
    assert text.endswith("<!-- end mergekit-mediator -->\n\nBelow.\n")
    assert text.startswith("---\n# ours\nlicense: mit\ntags: [merge]\nmodel-index:\n")
    assert refresh(root)
    assert card(root) == f"{HEADER}# Mine\n\n{generated_part(manifest())}\n\nBelow.\n"


def test_the_hub_reads_the_results_as_model_index(root):
    refresh(root, EVALUATION)
    results = ModelCard.load(root / "README.md").data.eval_results
    assert [(r.dataset_name, r.dataset_type, r.metric_name, r.metric_value) for r in results] == [
        ("math", "math.jsonl", "exact match, routed", 0.5),
        ("math", "math.jsonl", "exact match, dense expert alone", 0.25),
        ("code", "gym:codes", "exact match, routed", 0.875),
        ("code", "gym:codes", "exact match, dense expert alone", 0.3),
    ]
    assert {(r.task_type, r.metric_type) for r in results} == {("text-generation", "exact_match")}


THEIRS = {
    "task": {"type": "text-generation"},
    "dataset": {"name": "Theirs", "type": "org/theirs"},
    "metrics": [{"type": "accuracy", "value": 0.5}],
}


@pytest.mark.parametrize("flow", [False, True])
def test_results_of_other_people_stay_and_our_earlier_ones_go(root, flow):
    index = {"model-index": [{"name": "own name", "results": [THEIRS]}], "extra": 1}
    header = yaml.safe_dump(index, default_flow_style=flow)
    (root / "README.md").write_text(f"---\n{header}---\n{generated_part(manifest())}\n")
    for _ in range(2):
        refresh(root, EVALUATION)
        data = yaml.safe_load(card(root).split("---\n")[1])
        (model,) = data["model-index"]
        assert model["name"] == "own name"
        assert model["results"][0] == THEIRS
        assert [r["dataset"]["name"] for r in model["results"]] == ["Theirs", "math", "code"]
        assert data["extra"] == 1
    refresh(root)
    assert yaml.safe_load(card(root).split("---\n")[1]) == index


def test_a_part_that_people_changed_stays_with_a_note(root, capsys):
    changed = card(root).replace("10.0 MB", "ten megabytes")
    (root / "README.md").write_text(changed)
    assert not refresh(root, EVALUATION, PICTURES)
    assert card(root) == changed
    assert not (root / PICTURES[0]).exists()
    note = capsys.readouterr().err
    assert "stays as it is: somebody changed the part that mergekit-mediator wrote" in note
    digest = note.split("delete ")[1].split()[0]
    (root / "README.md").write_text(changed.replace(f" {digest}", ""))
    assert refresh(root, EVALUATION)
    assert "10.0 MB" in card(root)


@pytest.mark.parametrize("text", ["# All mine\n", "", "<!-- mergekit-mediator: no end -->\n"])
def test_a_card_without_the_part_stays_with_a_note(root, text, capsys):
    (root / "README.md").write_text(text)
    assert not refresh(root, EVALUATION)
    assert card(root) == text
    assert "it has no part of mergekit-mediator" in capsys.readouterr().err


def test_no_card_is_made_where_there_is_none(root):
    (root / "README.md").unlink()
    assert not refresh(root, EVALUATION)
    assert not (root / "README.md").exists()


def test_pictures_take_the_place_of_text_and_go_when_they_are_not_drawn(root):
    router = manifest(router=records.ROUTER).router
    refresh(root, EVALUATION, PICTURES, router=router)
    for name in PICTURES:
        assert f"]({name})" in card(root)
        assert (root / name).read_bytes() == name.encode()
    assert "0 0.500 ####" not in card(root)
    refresh(root, EVALUATION, PICTURES[:1], router=router)
    assert [name for name in PICTURES if (root / name).exists()] == [*PICTURES[:1]]
    assert PICTURES[1] not in card(root)
    assert "| held-out prompts of | math | code |\n| --- | ---: | ---: |\n| math | 9 | 1 |" in card(
        root
    )


def test_the_router_is_described_by_its_held_out_prompts(root):
    assert "Twenty prompts of each expert, and `calibrate`, route better." in card(root)
    refresh(root, router=records.ROUTER)
    assert "calibrated with 10 prompts of each expert" in card(root)
    assert "it gives 95.0% to their own expert; its expected calibration error is 0.040." in card(
        root
    )


def test_the_router_s_auroc_and_its_accuracy_in_the_evaluation_are_said(root):
    refresh(root, EVALUATION, router={**records.ROUTER, "ood_auroc": 0.9871, "ood_requests": 40})
    assert (
        "from 40 general requests, which it had not seen either, with an AUROC of 0.987."
        in card(root)
    )
    assert "The router gives 93.8% of the examples to the expert of their task." in card(root)
    refresh(root, router=records.ROUTER)
    assert "AUROC" not in card(root)


def test_line_ends_of_windows_stay(root):
    path = root / "README.md"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert refresh(root, EVALUATION)
    content = path.read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") > 50
    assert refresh(root)
    assert b"Below.\r\n" in path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\na: [\n---\n", "the metadata cannot be read: ParserError"),
        (b"---\nmodel-index: 3\n---\n", "the metadata cannot be read: TypeError"),
        (
            b"---\nmodel-index: [{name: x, results: [{}]}]\n---\n",
            "the metadata cannot be read: Key",
        ),
        (b"", "metadata between two lines --- required at the top: add them"),
        (b"\xff", "the card cannot be brought up to date: 'utf-8' codec"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused_in_one_line(root, content, message):
    before = content + generated_part(manifest()).encode()
    (root / "README.md").write_bytes(before)
    with pytest.raises(OutputError) as caught:
        refresh(root, EVALUATION, PICTURES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (root / "README.md").read_bytes() == before
    assert not (root / PICTURES[0]).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 2.0}, "router: accuracy: Input should be less than or equal to 1"),
        ({"confusion": [[1, 2]]}, "router: confusion: 2 rows of 2 numbers required"),
    ],
)
def test_damaged_figures_of_a_router_are_refused_in_one_line(root, change, message):
    with pytest.raises(ArtifactError) as caught:
        refresh(root, router={**records.ROUTER, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
