import pytest
import records
from matplotlib.figure import Figure

from mergekit_mediator.cli.panels import (
    draw_bytes,
    draw_conflict,
    draw_confusion,
    draw_reliability,
)
from mergekit_mediator.cli.plots import plot_artifact, plot_evaluation


@pytest.fixture
def axes():
    return Figure().subplots()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_conflict_has_a_line_per_metric_and_shades_routed_layers(axes):
    profile = {"sign": [0.1, 0.9], "mass": [0.2, 0.3]}
    draw_conflict(axes, ["embed", "0"], profile, [False, True])
    assert [list(line.get_xdata()) for line in axes.lines] == list(profile.values())
    assert legend(axes) == ["sign", "mass"]
    assert [(p.get_y(), p.get_height()) for p in axes.patches] == [(0.5, 1.0)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["embed", "0"]
    assert axes.yaxis_inverted()


def test_bytes_of_experts_stand_side_by_side(axes):
    draw_bytes(axes, ["0", "1"], {"math": [2000, 4000], "code": [1000, 0]})
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 2), (0, 4), (2, 1), (4, 0)]
    assert axes.get_xlabel() == "stored, kB"


def test_bytes_of_many_experts_are_summed_up_but_for_the_largest(axes):
    draw_bytes(axes, ["0"], {f"e{i}": [100 - i] for i in range(12)})
    assert legend(axes) == [*(f"e{i}" for i in range(7)), "5 others"]
    others = sum(100 - i for i in range(7, 12))
    assert axes.patches[-1].get_width() == pytest.approx(others / 1000)


def test_an_artifact_that_stores_nothing_is_drawn(axes):
    draw_bytes(axes, ["0"], {"math": [0]})
    assert axes.get_xlabel() == "stored, bytes"


def test_confusion_shows_shares_of_each_row_in_percent(axes):
    draw_confusion(axes, ["math", "code"], ["math", "code"], [[3, 1], [0, 0]])
    assert [(t.get_position(), t.get_text()) for t in axes.texts] == [
        ((0, 0), "75"),
        ((1, 0), "25"),
    ]


def test_reliability_has_a_circle_per_bin_larger_with_more_prompts(axes):
    draw_reliability(axes, [[4, 0.6, 0.75], [16, 0.97, 1.0]])
    assert [list(c.get_offsets()[0]) for c in axes.collections] == [[0.6, 0.75], [0.97, 1.0]]
    small, large = (c.get_sizes()[0] for c in axes.collections)
    assert small < large


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a picture and gives the labels of the horizontal axes."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))

    def draw(plot, content):
        plot(content, tmp_path / "picture.png")
        return [axes.get_xlabel() for axes in figures.pop().axes]

    return draw


LAYERS = ["conflict (routed layers shaded)", "stored, bytes"]


def test_the_picture_of_an_artifact_shows_layers_and_its_calibrated_router(drawn):
    assert drawn(plot_artifact, records.artifact()) == [*LAYERS, "routed to, %", "confidence"]
    assert drawn(plot_artifact, records.artifact(router=None)) == LAYERS


def test_a_router_of_an_older_version_has_no_reliability(drawn):
    router = {k: v for k, v in records.ROUTER.items() if k != "reliability"}
    assert drawn(plot_artifact, records.artifact(router)) == [*LAYERS, "routed to, %"]


def test_without_measured_conflict_only_bytes_are_drawn(drawn):
    artifact = records.artifact(router=None)
    artifact["layers"] = [{**layer, "conflict": {}} for layer in artifact["layers"]]
    assert drawn(plot_artifact, artifact) == ["stored, bytes"]


def test_the_picture_of_an_evaluation_shows_quality_confusion_and_reliability(drawn):
    labels = drawn(plot_evaluation, records.evaluation())
    assert sorted(labels) == ["bytes beside one model", "confidence", "routed to, %"]


def test_without_a_mean_the_picture_of_an_evaluation_has_no_quality(drawn):
    figures = records.evaluation()
    systems = {n: {**s, "normalized_mean": None} for n, s in figures["systems"].items()}
    labels = drawn(plot_evaluation, {**figures, "systems": systems})
    assert sorted(labels) == ["confidence", "routed to, %"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_suffix_chooses_the_format(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    plot_artifact(records.artifact(), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert suffix == ".png" or b">embed</text>" in content
