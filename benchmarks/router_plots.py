"""The router's pictures: reliability diagram and confusion matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor


def reliability(cases: Mapping[str, tuple[Tensor, Tensor]], path: Path, bins: int = 10) -> None:
    """Accuracy against confidence; cases are `[n, n_experts]` probabilities and `[n]` truths."""
    figure, axis = plt.subplots(figsize=(4.2, 4.0))
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for label, (probabilities, truth) in cases.items():
        confidence, choice = probabilities.max(dim=1)
        index = (confidence * bins).long().clamp_max(bins - 1)
        used = [b for b in range(bins) if int((index == b).sum()) >= 5]
        x = [float(confidence[index == b].mean()) for b in used]
        y = [float((choice == truth)[index == b].float().mean()) for b in used]
        axis.plot(x, y, marker="o", markersize=4, label=label)
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def confusion(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """Fractions of each true expert's prompts, rows are the truth."""
    share = matrix / matrix.sum(dim=1, keepdim=True)
    figure, axis = plt.subplots(figsize=(6.4, 6.0))
    axis.imshow(torch.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    for i, j in (share >= 0.05).nonzero().tolist():
        dark = "white" if share[i, j] > 0.5 else "black"
        axis.text(
            j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=5, color=dark
        )
    axis.set(xlabel="routed to", ylabel="task of the prompt")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
