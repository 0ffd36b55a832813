"""The gradients of a model's weights, of which only one is in memory at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Receiver(Protocol):
    """A receiver of the gradients of one weight.

    Attributes:
        weight: the model's own tensor, or a part of it.
    """

    weight: Tensor

    def add_gradient(self, gradient: Tensor) -> None:
        """Take one gradient, of the weight's shape. It is gone after the call."""
        ...


@contextmanager
def gradients(model: nn.Module, receivers: Sequence[Receiver]) -> Iterator[None]:
    """Hand each gradient of a model's weight to its receivers at once, so that only one is in memory.

    Args:
        model: in float32. Inside the context, its weights without a receiver have no gradients.
        receivers: of gradients.
    """
    hooks = []

    def collect(own: Sequence[Receiver], parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.contiguous()
            for receiver in own:
                offset = receiver.weight.storage_offset() - parameter.storage_offset()
                place = receiver.weight.shape, receiver.weight.stride(), offset
                receiver.add_gradient(gradient.as_strided(*place))
            parameter.grad = None

    storages: dict[int, list[Receiver]] = {}
    for receiver in receivers:
        storages.setdefault(receiver.weight.untyped_storage().data_ptr(), []).append(receiver)
    for parameter in model.parameters():
        own = storages.get(parameter.untyped_storage().data_ptr(), [])
        parameter.requires_grad_(bool(own))
        if own:
            register: Any = parameter.register_post_accumulate_grad_hook
            hooks.append(register(partial(collect, own)))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
