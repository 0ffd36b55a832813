"""Hidden states of the dense expert as features, from a pass that stops where they are."""

from typing import Any

import torch
from torch import Tensor, nn

from mergekit_mediator.calibrated import mean_hidden
from mergekit_mediator.errors import RoutingError


class _ReachedError(Exception):
    """Ends a forward pass at the layer that is asked for."""


@torch.no_grad()
def hidden_features(model: Any, ids: Tensor, mask: Tensor, counted: Tensor, layer: int) -> Tensor:
    """Mean hidden states `[batch, d]` float32 after the first `layer` decoder blocks, of length 1.

    Args:
        model: a transformers model that holds the dense expert.
        ids, mask: `[batch, length]`.
        counted: `[batch, length]` bool, the tokens that count.
        layer: from 1 to the number of decoder blocks; the others are not run.

    Raises:
        RoutingError: the model has no such blocks.
    """
    states: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    handle = _blocks(model)[layer - 1].register_forward_hook(stop)
    try:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return mean_hidden(states[0], counted)


def _blocks(model: Any) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise RoutingError(
        f"{type(model).__name__} has no list of {count} blocks: calibrate with --features embedding"
    )
