"""The picture of what routing each layer gives, with what predicts it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def gain_by_layer(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], path: Path) -> None:
    """One panel a family: gain of each layer as bars, and metrics as lines, each from its least to its largest
    over the blocks.

    Args:
        rows: of results/layers.json.
        metrics: to draw.
        path: of the PNG file.
    """
    figure, panels = plt.subplots(len(rows), 1, figsize=(8.0, 2.6 * len(rows)), squeeze=False)
    for panel, row in zip(panels[:, 0], rows, strict=True):
        layers = list(row["gain"])
        places = range(len(layers))
        panel.bar(places, [100 * row["gain"][x] for x in layers], color="0.8")
        panel.set_ylabel("loss recovered, %")
        panel.set_title(row["family"], fontsize=9, loc="left")
        panel.set_xticks(places, layers, rotation=90, fontsize=6)
        scale = panel.twinx()
        scale.set(ylim=(0, 1.05), yticks=[])
        blocks = [place for place, layer in enumerate(layers) if layer.isdigit()]
        for metric in metrics:
            profile = row["metrics"][metric]["profile"]
            values = [profile[layers[place]] for place in blocks]
            least, largest = min(values), max(values)
            line = [(value - least) / (largest - least) for value in values]
            scale.plot(blocks, line, linewidth=1.2, label=metric)
    handles, labels = scale.get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, frameon=False, ncols=len(metrics), loc="lower center"
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
