"""The features of prompts that calibrated routers take: hidden states of the dense expert, or mean embeddings.

`hidden` features are two states. The words of `SUMMARY` follow the prompt, and the state of the last of them
sums the prompt up. The mean state of the prompt's own tokens, some blocks earlier, describes its words. Each
tells tasks apart that the other confuses. The summary words are the idea of PromptEOL (Jiang et al., arXiv
2307.16645). The forward pass stops at the last state that it needs.
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

# Of ten phrases, this one told most tasks of `benchmarks/router_development.py` apart.
SUMMARY = "This is a problem about"


class _ReachedError(Exception):
    """A signal that ends a forward pass at the last layer that is needed."""


@torch.no_grad()
def hidden_features(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    counted: Tensor,
    summary: Tensor,
    layers: tuple[int, ...],
) -> Tensor:
    """Compute two hidden states of each prompt.

    The first is the mean over the tokens that count, after `layers[0]` decoder blocks. The second is the state
    of the last summary token after `layers[1]` blocks. Later blocks do not run.

    Args:
        model: a transformers model that holds the dense expert.
        ids: `[batch, length]` int64.
        mask: `[batch, length]`, 0 for padding.
        counted: `[batch, length]` bool, the tokens that count, at least one per row.
        summary: `[k]` int64, the tokens that follow every prompt.
        layers: two numbers of decoder blocks, ascending, from 1.

    Returns:
        The states side by side, `[batch, 2 d]` float32.

    Raises:
        RoutingError: the model has no list of decoder blocks.
    """
    order = mask.bool().to(torch.int8).argsort(dim=1, stable=True)  # padding first
    ids, mask, counted = (x.gather(1, order) for x in (ids, mask, counted.to(ids.device)))
    summaries = summary.to(ids.device).expand(len(ids), -1)
    ids = torch.cat([ids, summaries], dim=1)
    mask = torch.cat([mask, torch.ones_like(summaries)], dim=1)
    states: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        if len(states) == len(layers):
            raise _ReachedError

    blocks = _blocks(model)
    hooks = [Hook(blocks[layer - 1], record) for layer in layers]
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
        f"hidden features need a list of {count} decoder blocks, which {type(model).__name__} does not "
        "have: calibrate with --features embedding"
    )


def mean_embedding(ids: Tensor, mask: Tensor, table: Tensor, excluded: Tensor) -> Tensor:
    """Compute the mean embedding of each prompt's tokens.

    Args:
        ids: `[batch, seq]` int64.
        mask: `[batch, seq]`, 0 for padding.
        table: `[vocabulary, d]`, the input embedding.
        excluded: `[k]` int64, the tokens that do not count (those of the chat template). They count in a
            prompt that has no other tokens.

    Returns:
        `[batch, d]` float32.
    """
    real = mask.bool()
    counted = real & ~torch.isin(ids, excluded.to(ids.device))
    counted = torch.where(counted.any(dim=1, keepdim=True), counted, real)
    weight = counted.to(torch.float32) / counted.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bs,bsd->bd", weight, table[ids].to(torch.float32))


def mean_state(hidden: Tensor, counted: Tensor) -> Tensor:
    """Compute the mean hidden state of each prompt's tokens that count.

    Args:
        hidden: `[batch, seq, d]`, the states after a decoder block.
        counted: `[batch, seq]` bool, the tokens that count, at least one per row.

    Returns:
        `[batch, d]` float32.
    """
    weight = counted.to(hidden.device, torch.float32)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return torch.einsum("bs,bsd->bd", weight, hidden.to(torch.float32))


def hidden_layers(layers: int) -> tuple[int, int]:
    """Return the numbers of decoder blocks after which `hidden` features are taken.

    The states of the prompt's tokens are taken after two fifths of the blocks, that of the last token after
    four fifths. Both fractions were chosen on the tasks of `benchmarks/router_development.py`.

    Args:
        layers: the number of decoder blocks of the model.
    """
    return max(1, round(0.4 * layers)), max(1, round(0.8 * layers))


def embedding_features(
    prompts: Mapping[str, Sequence[Sequence[int]]], table: Tensor, excluded: Tensor
) -> dict[str, Tensor]:
    """Compute the mean embeddings of each expert's prompts.

    Args:
        prompts: by expert, the token ids of its prompts, as the model gets them.
        table: `[vocabulary, d]`, the input embedding.
        excluded: `[k]` int64, the tokens that do not count, usually from `shared_tokens` of all prompts.

    Returns:
        By expert, `[n_prompts, d]` float32, on the CPU.
    """
    return {
        name: torch.cat(
            [
                mean_embedding(ids, torch.ones_like(ids), table, excluded).cpu()
                for ids in (torch.tensor([row], device=table.device) for row in rows)
            ]
        )
        for name, rows in prompts.items()
    }


def shared_tokens(prompts: Mapping[str, Sequence[Sequence[int]]]) -> Tensor:
    """Return the token ids that every prompt has, `[k]` int64 ascending: those of the chat template."""
    sets = [set(ids) for rows in prompts.values() for ids in rows]
    return torch.tensor(sorted(set.intersection(*sets)) if sets else [], dtype=torch.int64)
