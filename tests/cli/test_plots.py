import json
import random
import sys
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mergekit_mediator.cli.plots import plot_quality
from mergekit_mediator.cli.point_labels import Label, name_points
from mergekit_mediator.cli.quality import extra_axis
from mergekit_mediator.errors import OutputError

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws systems and gives the figure instead of a file."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))

    def draw(rows):
        plot_quality(rows, tmp_path / "picture.png")
        return figures.pop()

    return draw


def system(mean, worst, size):
    return {"normalized_mean": mean, "normalized_worst": worst, "total_bytes_over_base": size}


def texts(figure):
    return {text.get_text(): text for text in figure.axes[0].texts}


def boxes(figure):
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    "name",
    [
        "experts-4",
        "experts-8",
        "experts-4-again",
        "experts-4-cut-short",
        "experts-4-third",
        "experts-overlap",
    ],
)
def test_every_system_of_our_results_is_named_at_its_point_and_no_name_covers_another(drawn, name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["systems"]
    figure = drawn(rows)
    names = [one for text in texts(figure) for one in text.split(", ")]
    assert sorted(names) == sorted(set(rows) - {"experts", "best_static"})
    assert not any(a.overlaps(b) for a, b in combinations(boxes(figure), 2))
    assert figure.axes[0].get_legend() is None


def test_systems_at_one_point_share_a_label(drawn):
    rows = {"ties": system(30, 0, 1.0), "average": system(30.2, 0.1, 1.0), "x": system(60, 9, 1.5)}
    assert set(texts(drawn(rows))) == {"ties, average", "x"}


def test_systems_without_extra_bytes_stand_at_the_left_edge():
    axes = Figure().subplots()
    places = extra_axis(axes, [0.0, 0.05, 3.0])
    assert places == [0.01, 0.05, 3.0]
    assert axes.get_xscale() == "log"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["none", "+3%", "+10%", "+30%", "+1 model", "+3 models"]
    assert axes.get_xticks()[0] == places[0]


def test_systems_none_of_which_takes_extra_bytes_are_drawn(drawn):
    figure = drawn({"base": system(0, 0, 1.0), "ties": system(40, 10, 1.0)})
    assert set(texts(figure)) == {"base", "ties"}


def test_a_line_goes_from_the_mean_down_to_the_worst_task(drawn):
    lines = drawn({"ties": system(40, 10, 1.2)}).axes[0].lines
    assert [10, 40] in [list(line.get_ydata()) for line in lines]


def test_names_of_a_crowd_neither_cover_each_other_nor_a_point():
    chance = random.Random(0)
    for _ in range(20):
        figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set(xlim=(0, 10), ylim=(0, 110))
        points = [
            Label(f"system {i}", chance.choice((1, 2, 5)), chance.uniform(20, 100), 0, "k")
            for i in range(12)
        ]
        name_points(figure, axes, points)
        marks = axes.transData.transform([(p.x, p.y) for p in points])
        named = boxes(figure)
        assert not any(a.overlaps(b) for a, b in combinations(named, 2))
        assert not any(box.contains(*mark) for box in named for mark in marks)


def test_there_is_nothing_to_draw_where_no_expert_answers_anything(tmp_path):
    rows = {"base": {"normalized_mean": None, "total_bytes_over_base": 1.0}}
    with pytest.raises(OutputError, match=r"p\.png: there is nothing to draw"):
        plot_quality(rows, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_is_written_or_refused_by_name(tmp_path):
    rows = {"ties": system(40, 10, 1.2)}
    plot_quality(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match=r"p\.doc: cannot be written"):
        plot_quality(rows, tmp_path / "p.doc")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match=r"pip install mergekit-mediator\[plot\]"):
        plot_quality({"ties": system(40, 10, 1.2)}, tmp_path / "p.png")
