"""What several prompts begin with, such as instructions: read once, and gone on from in every batch."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Layers of transformers' caches that replace their keys and values, as gradients need it.
_ORDINARY = {"DynamicLayer", "DynamicSlidingWindowLayer"}


class Prefix:
    """Tokens that a model has read, as the cache that it filled.

    Gradients stop at its keys and values until `backward`, so that those of the weights come once for
    what follows it and once for itself, and never wait for each other.

    Attributes:
        length: in tokens.
    """

    def __init__(self, cache: Any, argument: str) -> None:
        """`cache` is of one row, `argument` what the model calls it."""
        self._cache, self._argument = cache, argument
        self.length = int(cache.get_seq_length())
        self._joints: list[tuple[Tensor, Tensor]] = []
        if torch.is_grad_enabled():
            for layer in cache.layers:
                layer.keys, layer.values = self._cut(layer.keys), self._cut(layer.values)

    def inputs(self, batch: int) -> dict[str, Any]:
        """Arguments with which the model goes on from here, in so many rows."""
        shared = {id(after): after for _, after in self._joints}
        cache = copy.deepcopy(self._cache, shared)
        cache.batch_repeat_interleave(batch)
        return {self._argument: cache, "use_cache": True}

    def backward(self) -> None:
        """Pass on the gradients of all that went on from here."""
        reached = [(before, after) for before, after in self._joints if after.grad is not None]
        if reached:
            torch.autograd.backward(
                [before for before, _ in reached], [after.grad for _, after in reached]
            )

    def _cut(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        self._joints.append((tensor, tensor.detach().requires_grad_()))
        return self._joints[-1][1]


def read_prefix(model: Any, prompts: Sequence[list[int]]) -> Prefix | None:
    """Have a model read what all prompts begin with, but for the last token of the shortest.

    Args:
        model: any `AutoModelForCausalLM`, or what has its forward.
        prompts: token ids.

    Returns:
        None where there is nothing to save, or the model keeps no cache that can be gone on from.
    """
    parameters = inspect.signature(model.forward).parameters
    # transformers renamed it in 5.24
    argument = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if len(prompts) < 2 or argument is None:
        return None
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1  # the last token of a prompt predicts the answer
    common = next((i for i in range(shortest) if first[i] != last[i]), shortest)
    if common < 1:
        return None
    ids = torch.tensor([first[:common]], device=next(model.parameters()).device)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    output = model(input_ids=ids, use_cache=True, **keep)
    cache = getattr(output, "cache", None) or output.past_key_values
    layers = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    if torch.is_grad_enabled() and not (layers and layers <= _ORDINARY):
        return None
    return Prefix(cache, argument) if hasattr(cache, "batch_repeat_interleave") else None
