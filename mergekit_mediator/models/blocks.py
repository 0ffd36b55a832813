"""The decoder blocks of a model, which can run one by one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_mediator.errors import ArtifactError


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides the hidden states: masks and positions of one text."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Find the decoder blocks of a causal language model.

    Raises:
        ArtifactError: the model has no list of as many modules as its configuration has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ArtifactError(
        f"{type(model).__name__}: a list of {count} decoder blocks required, as the configuration says, got none"
    )


def weights_of(module: nn.Module, places: Mapping[str, Tensor]) -> list[str]:
    """Select the weights that a module holds.

    Args:
        module: a part of a model.
        places: the tensors of the model's weights by name, from `locate_weights`.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    return [name for name, place in places.items() if place.untyped_storage().data_ptr() in own]


@torch.no_grad()
def read_text(model: Any, tokens: Sequence[int]) -> tuple[Tensor, list[Call]]:
    """Read one text, and note how each block is called.

    Args:
        model: a causal language model.
        tokens: of the text.

    Returns:
        The hidden states before the first block, `[1, tokens, width]`, and the calls of all blocks.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            first.append(args[0])
        calls.append(Call(args[1:], kwargs))

    handles = [
        block.register_forward_pre_hook(note, with_kwargs=True) for block in decoder_blocks(model)
    ]
    try:
        model(torch.tensor([list(tokens)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return first[0], calls


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run one block on hidden states `[1, tokens, width]`; return those after it."""
    output = block(hidden, *call.args, **call.kwargs)
    after: Tensor = output[0] if isinstance(output, tuple) else output
    return after


@contextmanager
def input_products(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Average the products xᵀx of the inputs x `[1, in]` of modules that run inside the context.

    Args:
        modules: by any name.

    Yields:
        After the context, the mean over all tokens `[in, in]` float32 by name; modules that did not run are missing.
    """
    means: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def add(name: str, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        product = rows.T @ rows
        means[name] = means[name].add_(product) if name in means else product
        counts[name] += len(rows)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args))
        for name, module in modules.items()
    ]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
    for name, total in means.items():
        total.div_(counts[name])
