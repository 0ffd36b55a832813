import pytest
import yaml
from huggingface_hub import ModelCard

from mergekit_mediator.cli.plots import plot_conflict
from mergekit_mediator.errors import OutputError
from mergekit_mediator.merge.card import write_card
from mergekit_mediator.models.sources import is_hub_id
from mergekit_mediator.store.card_text import conflict_chart
from mergekit_mediator.store.manifest import BaseEntry, ExpertEntry, LayerEntry, Manifest


def manifest(base="org/base", sources=("org/math", "/home/me/secret/code", "org/base+org/lora")):
    return Manifest(
        format_version=1,
        package_version="0",
        base=BaseEntry(source=base, files={}),
        experts=tuple(
            ExpertEntry(name=f"e{i}", source=s, file=f"experts/e{i}.safetensors")
            for i, s in enumerate(sources)
        ),
        layers=(
            LayerEntry(name="embed", weights=("w",), conflict={"sign": 0.5}, routed=False),
            LayerEntry(name="0", weights=("x",), conflict={"sign": 1.0}, routed=True),
        ),
        parameters={"conflict": "sign"},
        parameter_count=1,
        files={},
    )


@pytest.fixture
def card(tmp_path):
    config = "merge_method: mediator\nmodels: [{model: /home/me/secret/code}]"
    write_card(tmp_path, manifest(), config)
    return (tmp_path / "README.md").read_text()


def test_the_metadata_names_models_of_the_hub_only(card):
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["org/base", "org/math", "org/lora"]
    assert metadata["library_name"] == "transformers"
    assert "mergekit-mediator" in metadata["tags"]


def test_the_hub_reads_the_card_and_shows_it_as_a_merge(tmp_path):
    write_card(tmp_path, manifest(), "merge_method: mediator")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == ["org/base", "org/math", "org/lora"]
    assert read.data.to_dict()["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    ("of_base", "of_experts", "stated"),
    [("mit", "mit", "mit"), ("mit", "apache-2.0", None), (None, "mit", None), (None, None, None)],
)
def test_a_licence_is_claimed_only_if_every_model_states_it(tmp_path, of_base, of_experts, stated):
    plain = manifest()
    licensed = plain.model_copy(
        update={
            "base": plain.base.model_copy(update={"license": of_base}),
            "experts": tuple(e.model_copy(update={"license": of_experts}) for e in plain.experts),
        }
    )
    write_card(tmp_path, licensed, "merge_method: mediator")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict().get("license") == stated
    assert f"| {of_experts or 'not stated'} |" in card.text
    assert ("The licences of these models differ: " in card.text) == (of_base != of_experts)


def test_languages_and_datasets_are_those_that_the_models_cards_state(tmp_path):
    cards = {
        "base": "---\nlanguage: en\n---\n",
        "math": "---\nlanguage: [en, de]\ndatasets: [org/sums]\n---\n",
        "code": "# no metadata\n",
    }
    for name, text in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
    base, *sources = [str(tmp_path / name) for name in cards]
    write_card(tmp_path, manifest(base, sources), "merge_method: mediator")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["language"] == ["en", "de"]
    assert data["datasets"] == ["org/sums"]
    assert data["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    ("parameters", "dense"),
    [
        ({}, "the experts' weighted mean. It"),
        (
            {"reference": "base"},
            "the base model, with the experts' weighted mean in averaged layers. It",
        ),
    ],
)
def test_the_card_says_what_the_dense_expert_is(tmp_path, parameters, dense):
    plain = manifest()
    changed = plain.model_copy(update={"parameters": {**plain.parameters, **parameters}})
    write_card(tmp_path, changed, "merge_method: mediator")
    assert f"*dense expert*: {dense}" in (tmp_path / "README.md").read_text()


def test_no_directory_of_this_machine_is_shown(card):
    assert "/home/me" not in card
    assert "`code`" in card
    assert "models: [{model: code}]" in card


def test_the_card_shows_conflict_and_configuration(card):
    assert conflict_chart(["embed", "0"], [0.5, 1.0], [False, True]) in card
    assert "```yaml\nmerge_method: mediator\nmodels:" in card


def test_the_generated_part_is_marked_so_that_people_can_write_around_it(card):
    begin, end = card.index("<!-- mergekit-mediator "), card.index("<!-- end mergekit-mediator")
    for heading in ("Conflict and sizes", "Routing", "Evaluation", "Limits"):
        assert begin < card.index(f"\n## {heading}\n") < end
    for heading in ("How to load it", "Models", "Configuration"):
        assert not begin < card.index(f"\n## {heading}\n") < end


def test_the_card_is_named_after_the_directory_that_will_be_published(tmp_path):
    staging = tmp_path / ".my-model.partial-123"
    staging.mkdir()
    write_card(staging, manifest(), "x")
    assert "\n# my-model\n" in (staging / "README.md").read_text()


def test_the_chart_has_a_line_per_layer_and_tells_routed_from_averaged():
    chart = conflict_chart(["embed", "0", "10"], [0.0, 0.5, 1.0], [False, False, True])
    assert chart.splitlines() == [
        "embed 0.000",
        "    0 0.500 ...............",
        "   10 1.000 ##############################",
    ]


@pytest.mark.parametrize("source", ["./base", "/a/b", "base", "a/b/c", "../a"])
def test_a_path_is_no_hub_id(source):
    assert not is_hub_id(source)


def test_a_relative_directory_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("models/base")
    assert is_hub_id("models/other")


def test_the_picture_is_written_or_refused_by_name(tmp_path):
    profile = {"sign": [0.1, 0.9]}
    plot_conflict(tmp_path / "x.png", ["embed", "0"], profile, [False, True])
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(OutputError, match=r"x\.doc: cannot be written"):
        plot_conflict(tmp_path / "x.doc", ["embed", "0"], profile, [False, True])
