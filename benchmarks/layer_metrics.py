"""What could predict the gain of routing a layer: from the weights alone, and from a few activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from baselines import State
from layer_gains import Patchwork, layer_names, rotary
from torch import Tensor, nn

from mergekit_mediator.merge import conflict
from mergekit_mediator.merge.conflict import Conflict

DENOISE = (0.05, 0.1, 0.2, 0.5, 1.0)
Profile = dict[str, float]  # one number by layer


def layer_of(weight: str) -> str:
    """The layer of a weight of a Llama."""
    parts = weight.split(".")
    return (
        parts[2] if parts[1] == "layers" else {"embed_tokens": "embed", "norm": "final"}[parts[1]]
    )


def of_weights(base: State, experts: Sequence[State]) -> dict[str, Profile]:
    """Profiles by metric that need the weights only.

    `size` is Σ_t ‖τ_t‖², `relative size` that over ‖θ_0‖², and `spread` Σ_t ‖τ_t − τ̄‖², which is
    dispersion times size.
    """
    layers = list(dict.fromkeys(map(layer_of, base)))
    sums = {(d, layer): Conflict() for d in DENOISE for layer in layers}
    norms = dict.fromkeys(layers, 0.0)
    for name, weight in base.items():
        layer = layer_of(name)
        norms[layer] += float(weight.float().square().sum())
        for denoise in DENOISE:
            sums[denoise, layer] += conflict.measure(weight, [e[name] for e in experts], denoise)
    total = {layer: sums[1.0, layer] for layer in layers}
    profiles = {
        f"sign, denoise {denoise:g}": {layer: sums[denoise, layer].sign for layer in layers}
        for denoise in DENOISE
    }
    profiles["mass"] = {layer: c.mass for layer, c in total.items()}
    profiles["dispersion"] = {layer: c.dispersion for layer, c in total.items()}
    profiles["size"] = {layer: c.total_energy for layer, c in total.items()}
    profiles["relative size"] = {layer: c.total_energy / norms[layer] for layer, c in total.items()}
    profiles["spread"] = {layer: c.total_energy - c.common_energy for layer, c in total.items()}
    return profiles


@torch.inference_mode()
def of_activations(
    source: Any, average: Any, experts: dict[str, Any], texts: dict[str, list[list[int]]]
) -> dict[str, Profile]:
    """Profiles by metric of what averaging does to each layer's outputs.

    Inputs are those that `source` gives the layer on each expert's texts. With h_j the mean of the
    squares of a linear's input j, `linear error` sums Σ_j h_j ‖(θ_t − θ̄)_{:,j}‖² over experts and
    over the layer's linears and norms (diagonal linears); the embedding's are the rows of its
    tokens, and as the tied head it counts too. `output error` sums, over experts, the error of the
    whole layer's output over the squared norm of that output, per token; the first token of a
    text, whose states are huge, does not count. `last state`, of experts that read their own texts,
    asks the whole model, without answers: what part of the error of the state that the first
    answer token is read from goes when the layer alone is the expert's.

    Args:
        source: the model that reads the texts; None where each expert reads its own.
        average: the model with averaged weights.
        experts: models by name.
        texts: token ids by expert.
    """
    layers = layer_names(average)
    linear, output, last = (dict.fromkeys(layers, 0.0) for _ in range(3))
    averaged = average.state_dict()
    for name, expert in experts.items():
        reader, own = source or expert, expert.state_dict()
        squares: dict[str, Tensor] = {}
        tokens = sum(map(len, texts[name]))
        for ids in texts[name]:
            with _recorded(reader, squares):
                states = reader(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer, error in _output_errors(states[:-1], average, expert, ids).items():
                output[layer] += error / tokens
            if source is None:
                for layer, part in _last_state(Patchwork(average, expert), ids).items():
                    last[layer] += part / len(texts[name])
        for weight, total in squares.items():
            delta = (own[weight].float() - averaged[weight].float()).square()
            columns = delta.sum(0) if delta.ndim == 2 else delta
            linear[layer_of(weight)] += float((total / tokens * columns).sum())
        delta = (own["model.embed_tokens.weight"] - averaged["model.embed_tokens.weight"]).float()
        for ids in texts[name]:
            linear["embed"] += float(delta[ids].square().sum()) / tokens
    found = {"linear error": linear, "output error": output}
    return found if source else found | {"last state": last}


@contextmanager
def _recorded(model: Any, squares: dict[str, Tensor]) -> Iterator[None]:
    """Adds up the squared inputs `[in]` of every linear, and of every norm's weight, by weight name."""
    hooks = []

    def record(name: str, module: nn.Module) -> None:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if not isinstance(module, nn.Linear):
                epsilon: Any = (
                    getattr(module, "variance_epsilon", None) or module.eps
                )  # Llama's, Gemma's
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
            squares[name] = squares.get(name, torch.zeros(())) + x.square().sum(0)

        hooks.append(module.register_forward_pre_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("norm"):
            record("model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight", module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _output_errors(inputs: Sequence[Tensor], average: Any, expert: Any, ids: list[int]) -> Profile:
    """By layer, Σ over tokens of ‖average's output − expert's‖² / ‖expert's‖² on these inputs.

    Args:
        inputs: of every block, each `[1, n, hidden]`.
        average, expert: models.
        ids: `[n]` tokens that they were made from.
    """
    positions = torch.arange(len(ids))[None]

    def outputs(model: Any) -> Iterator[Tensor]:
        yield model.model.embed_tokens(torch.tensor([ids]))
        turned = [rotary(model.model, i, hidden, positions) for i, hidden in enumerate(inputs)]
        for block, hidden, own in zip(model.model.layers, inputs, turned, strict=True):
            yield block(hidden, position_embeddings=own)
        last = expert.model.layers[-1](inputs[-1], position_embeddings=turned[-1])
        yield model.model.norm(last)

    return {
        layer: _relative_error(found, right)
        for layer, found, right in zip(
            layer_names(average), outputs(average), outputs(expert), strict=True
        )
    }


def _relative_error(found: Tensor, right: Tensor) -> float:
    found, right = found[0, 1:].float(), right[0, 1:].float()
    return float(((found - right).square().sum(-1) / right.square().sum(-1)).sum())


def _last_state(patchwork: Patchwork, ids: list[int]) -> Profile:
    """By layer, the part of the squared error of the text's last state that routing it alone takes away."""
    positions = torch.arange(len(ids))[None]

    def state(*routed: str) -> Tensor:
        patchwork.routed = frozenset(routed)
        states = patchwork.model(torch.tensor([ids]), positions, None, False).last_hidden_state
        return states[0, -1].float()

    right, average = state(*patchwork.layers), state()
    error = (average - right).square().sum()
    return {
        layer: 1 - float((state(layer) - right).square().sum() / error)
        for layer in patchwork.layers
    }
