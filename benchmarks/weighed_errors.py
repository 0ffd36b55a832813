"""Does an expert keep more if squared error is weighed by how much inputs and gradients there are?

    python benchmarks/weighed_errors.py --base BASE --base-name SmolLM2-135M --experts DIR --tasks A,B

The error of weight [i, j] reaches the loss about as E[g_i²] E[x_j²], with x the inputs of the matrix and g the gradients
of its outputs (the diagonals of K-FAC, Martens and Grosse, arXiv 1503.05671). Both are taken from prompts that no table
reports, with answers that are drawn from the expert at temperature 2: at 1 it is nearly sure of them, and there is no
gradient. Our form then stores diag(E[g²])^(p/2) D diag(E[x²])^(q/2) in place of the change D, and a reader divides. The
bits of the diagonals, 8 a number, are counted. "Gain kept" is that of rates.py, on prompts of the report. Rows are added
to results/weighed-errors.json one by one, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from artifacts import CALIBRATION_SEED, DTYPE
from baselines import State, expert, load, task_config
from rates import add, answers
from stored_forms import Change, Form
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_experts import REPORT_SEED, answer_logits, tokenised
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.delta import tradeoff
from mergekit_mediator.delta.approximate import approximate
from mergekit_mediator.delta.decomposition import decompose
from mergekit_mediator.delta.factors import Components
from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.store.codec import encode_bytes

NAME = "weighed-errors"
RATES = (0.08, 0.25)
# The powers of the second moments of a matrix's inputs and of the gradients of its outputs.
POWERS = {
    "plain": (0.0, 0.0),
    "inputs, power 1/2": (0.5, 0.0),
    "inputs, power 1": (1.0, 0.0),
    "both, power 1/2": (0.5, 0.5),
    "both, power 1": (1.0, 1.0),
}
TEMPERATURE = 2.0
_BATCH = 8
_FLOOR = (
    1e-4  # of the mean: a moment below it counts as so much, or its weights could lose anything
)
_MOMENT_BITS = 8


@dataclass(frozen=True)
class Moments:
    """The second moments of one matrix `[out, in]`.

    Attributes:
        inputs: `[in]` float64, the sum of squares over tokens.
        gradients: `[out]` float64, the same of the gradients of its outputs.
    """

    inputs: Tensor
    gradients: Tensor

    @classmethod
    def zeros(cls, linear: nn.Linear) -> Moments:
        return cls(
            torch.zeros(linear.in_features, dtype=torch.float64),
            torch.zeros(linear.out_features, dtype=torch.float64),
        )

    def scales(self, inputs: float, outputs: float) -> tuple[Tensor, Tensor]:
        """The factors of the columns `[in]`, whose mean square is about 1, and of the rows `[out, 1]`, float32."""
        rows = self.gradients * self.inputs.mean()
        columns = self.inputs / self.inputs.mean()
        return (
            columns.clamp(min=_FLOOR).pow(inputs / 2).float(),
            rows.clamp(min=_FLOOR * float(rows.mean())).pow(outputs / 2).float()[:, None],
        )


def moments_of(model: nn.Module, pairs: list[Any], names: set[str]) -> dict[str, Moments]:
    """The second moments of these weights of linear modules, on prompts that the model answers itself."""
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    }
    moments = {name: Moments.zeros(module) for name, module in linears.items()}
    hooks: list[Any] = []
    for name, module in linears.items():
        into = moments[name]
        hooks.append(module.register_forward_pre_hook(partial(_add_inputs, into.inputs)))
        hooks.append(module.register_full_backward_hook(partial(_add_gradients, into.gradients)))
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for start in range(0, len(pairs), _BATCH):
            logits, _, _ = answer_logits(model, pairs[start : start + _BATCH])
            tempered = logits / TEMPERATURE
            drawn = tempered.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
            cross_entropy(tempered, drawn, reduction="sum").backward()
            model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return moments


def _add_inputs(into: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    into += inputs[0].detach().double().flatten(0, -2).square().sum(0)


def _add_gradients(into: Tensor, module: nn.Module, _: Any, outputs: tuple[Tensor, ...]) -> None:
    into += outputs[0].double().flatten(0, -2).square().sum(0)


class Weighed:
    """A change with its rows and columns scaled, and what it then costs at each slope."""

    def __init__(self, moments: Mapping[str, Moments], inputs: float, outputs: float) -> None:
        self._powers = inputs, outputs
        self._scales = {name: m.scales(inputs, outputs) for name, m in moments.items()}
        rows = [float(r.square().mean()) for _, r in self._scales.values()]
        # Vectors, and matrices without moments, count like the mean matrix.
        self._unit = (sum(rows) / len(rows)) ** 0.5
        self._made: tuple[State, dict[str, Components], Tensor] | None = None

    def __call__(self, change: Change, bits: float) -> tuple[State, float]:
        """The weights as a reader gets them back, and the bits per parameter."""
        scaled, components, costs = self._made or self._prepared(change)
        self._made = scaled, components, costs
        slope = tradeoff.slope_for(costs, change.numel, bits - self._extra(change))
        weights, stored_bytes = {}, 0
        for name, difference in scaled.items():
            dtype = change.base[name].dtype
            stored = approximate(difference, slope, torch.float32, 0.0, components.get(name))
            stored_bytes += encode_bytes(stored)[0].numel()
            restored = torch.zeros_like(difference)
            mix_(restored, [(1.0, stored)])
            if name in self._scales:
                columns, rows = self._scales[name]
                restored = restored / columns / (rows / self._unit)
            weights[name] = (change.base[name].float() + restored).to(dtype)
        return weights, 8 * stored_bytes / change.numel + self._extra(change)

    def _prepared(self, change: Change) -> tuple[State, dict[str, Components], Tensor]:
        scaled, components = {}, {}
        costs = torch.zeros(len(tradeoff.SLOPES), dtype=torch.float64)
        for name, difference in change.differences.items():
            scaled[name] = difference
            if name in self._scales:
                columns, rows = self._scales[name]
                scaled[name] = difference * columns * (rows / self._unit)
            if name in change.matrices:
                components[name] = decompose(scaled[name])
            costs += tradeoff.tradeoff(scaled[name], components.get(name))[0]
        return scaled, components, costs

    def _extra(self, change: Change) -> float:
        """The bits per parameter that the scales take."""
        columns, rows = (bool(power) for power in self._powers)
        numbers = sum(len(c) * columns + len(r) * rows for c, r in self._scales.values())
        return _MOMENT_BITS * numbers / change.numel


def forms(moments: Mapping[str, Moments]) -> dict[str, Form]:
    """Our form with each choice of powers, at each rate."""
    weighed = {name: Weighed(moments, *powers) for name, powers in POWERS.items()}
    return {
        f"{name}, {bits:g}": partial(form, bits=bits)
        for name, form in weighed.items()
        for bits in RATES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Does weighing squared error help?")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--base-name", required=True, help="what to call the base")
    parser.add_argument("--family", default="strong", help="what to call these experts")
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of experts, separated by commas")
    parser.add_argument("--prompts", type=int, default=64, help="of each task, that are reported")
    parser.add_argument("--asked", type=int, default=24, help="prompts that give the moments")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    base = load(args.base)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=DTYPE).eval()
    for task in args.tasks.split(","):
        folder = args.experts / task
        change = Change(base, expert(base, folder))
        pairs = tokenised(tokenizer, task, task_config(folder), CALIBRATION_SEED, args.asked)
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        moments = moments_of(own, pairs, set(change.matrices))
        del own
        nats = answers(model, tokenizer, folder, args.prompts, REPORT_SEED)
        head = {"base": args.base_name, "family": args.family, "expert": task}
        head |= {"prompts": args.prompts}
        seeds = {"report": REPORT_SEED, "moments": CALIBRATION_SEED, "draws": 0}
        add(NAME, head, change, nats, forms(moments), seeds)
        nats(change.base)  # the next expert changes other weights


if __name__ == "__main__":
    main()
