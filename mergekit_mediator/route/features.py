"""Hidden states of the dense expert as features, from a pass that stops where they are.

After the prompt the model begins to say what it is about. Its last state sums the prompt up; the
mean over the prompt's own tokens, some blocks earlier, says what the prompt is made of. Each tells
tasks apart that the other confuses. Words that make a model sum up a text are the idea of PromptEOL
(Jiang et al., arXiv 2307.16645).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.models.hooks import Hook, hooked
from mergekit_mediator.route.calibrated_file import Head as Head
from mergekit_mediator.route.calibrated_file import Kind as Kind

SUMMARY = "This is a problem about"  # of ten, the one that told most tasks of the development set


class _ReachedError(Exception):
    """Ends a forward pass at the last layer that is asked for."""


@torch.no_grad()
def hidden_features(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    counted: Tensor,
    summary: Tensor,
    layers: tuple[int, ...],
) -> Tensor:
    """Two hidden states side by side, `[batch, 2 d]` float32.

    The first is the mean over the tokens that count after the first `layers[0]` decoder blocks, the
    second that of the last token after `layers[1]`; later blocks are not run.

    Args:
        model: a transformers model that holds the dense expert.
        ids, mask: `[batch, length]`.
        counted: `[batch, length]` bool, the tokens that count, at least one per row.
        summary: `[k]` int64, put after every prompt; its last token is the last one.
        layers: ascending, from 1 to the number of decoder blocks.

    Raises:
        RoutingError: the model has no such blocks.
    """
    order = mask.bool().to(torch.int8).argsort(dim=1, stable=True)  # padding in front
    ids, mask, counted = (x.gather(1, order) for x in (ids, mask, counted.to(ids.device)))
    begun = summary.to(ids.device).expand(len(ids), -1)
    ids, mask = torch.cat([ids, begun], dim=1), torch.cat([mask, torch.ones_like(begun)], dim=1)
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        if len(states) == len(layers):
            raise _ReachedError

    blocks = _blocks(model)
    hooks = [Hook(blocks[layer - 1], keep) for layer in layers]
    with suppress(_ReachedError), hooked(hooks):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    prompt = mean_state(states[0][:, : counted.shape[1]], counted)
    return torch.cat([prompt, states[1][:, -1].to(torch.float32)], dim=1)


def _blocks(model: Any) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise RoutingError(
        f"{type(model).__name__} has no list of {count} blocks: calibrate with --features embedding"
    )


def mean_embedding(ids: Tensor, mask: Tensor, table: Tensor, excluded: Tensor) -> Tensor:
    """The mean embedding of each prompt's tokens, but for those that tell prompts apart in nothing.

    Args:
        ids: `[batch, seq]` int64.
        mask: `[batch, seq]`, 0 for padding.
        table: `[vocabulary, d]`, the input embedding.
        excluded: `[k]` int64, the tokens that do not count (those of the chat template). A prompt
            of such tokens alone is the mean of them.

    Returns:
        `[batch, d]` float32.
    """
    real = mask.bool()
    counted = real & ~torch.isin(ids, excluded.to(ids.device))
    counted = torch.where(counted.any(dim=1, keepdim=True), counted, real)
    weight = counted.to(torch.float32) / counted.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bs,bsd->bd", weight, table[ids].to(torch.float32))


def mean_state(hidden: Tensor, counted: Tensor) -> Tensor:
    """The mean hidden state of each prompt's tokens that count.

    Args:
        hidden: `[batch, seq, d]`, after some decoder block.
        counted: `[batch, seq]` bool. At least one per row.

    Returns:
        `[batch, d]` float32.
    """
    weight = counted.to(hidden.device, torch.float32)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return torch.einsum("bs,bsd->bd", weight, hidden.to(torch.float32))


def hidden_layers(layers: int) -> tuple[int, int]:
    """After how many decoder blocks of a model `hidden` features are taken: of the prompt's tokens
    after two fifths, of the last one after four fifths; see the benchmark."""
    return max(1, round(0.4 * layers)), max(1, round(0.8 * layers))


def embedding_features(
    prompts: Mapping[str, Sequence[Sequence[int]]], table: Tensor, excluded: Tensor
) -> dict[str, Tensor]:
    """Mean embeddings by expert, `[n_prompts, d]` float32.

    Args:
        prompts: by expert, token ids of its prompts, as the model gets them.
        table: `[vocabulary, d]`, the input embedding.
        excluded: `[k]` int64, usually from `shared_tokens` of all prompts.
    """
    return {
        name: torch.cat(
            [
                mean_embedding(torch.tensor([ids]), torch.ones(1, len(ids)), table, excluded)
                for ids in rows
            ]
        )
        for name, rows in prompts.items()
    }


def shared_tokens(prompts: Mapping[str, Sequence[Sequence[int]]]) -> Tensor:
    """The token ids that every prompt has, `[k]` int64 ascending: those of the chat template."""
    sets = [set(ids) for rows in prompts.values() for ids in rows]
    return torch.tensor(sorted(set.intersection(*sets)) if sets else [], dtype=torch.int64)
