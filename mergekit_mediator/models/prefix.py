"""The common first tokens of several prompts, such as instructions.

The model reads them once. Every batch continues from the cache that it filled.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Layers of transformers' caches that make new keys and values instead of writing in place: gradients need that.
_ORDINARY = {"DynamicLayer", "DynamicSlidingWindowLayer"}


class Prefix:
    """The cache that a model filled when it read the common first tokens.

    Gradients stop at the keys and values of the cache until `backward`. So each weight gets one gradient from
    the tokens after the prefix and one from the prefix, and the first does not wait for the second.

    Attributes:
        length: the number of tokens.
    """

    def __init__(self, cache: Any, argument: str) -> None:
        """Take a cache over, and cut it from the graph if gradients are enabled.

        Args:
            cache: a cache of one row.
            argument: the name of the model's argument for the cache.
        """
        self._cache, self._argument = cache, argument
        self.length = int(cache.get_seq_length())
        self._joints: list[tuple[Tensor, Tensor]] = []
        if torch.is_grad_enabled():
            for layer in cache.layers:
                layer.keys, layer.values = self._cut(layer.keys), self._cut(layer.values)

    def inputs(self, batch: int) -> dict[str, Any]:
        """Return the model's arguments to continue from the prefix in `batch` rows."""
        shared = {id(leaf): leaf for _, leaf in self._joints}
        cache = copy.deepcopy(self._cache, shared)
        cache.batch_repeat_interleave(batch)
        return {self._argument: cache, "use_cache": True}

    def backward(self) -> None:
        """Pass the gradients of the keys and values to the weights, once all batches have run backward."""
        joints = [(source, leaf) for source, leaf in self._joints if leaf.grad is not None]
        if joints:
            torch.autograd.backward(
                [source for source, _ in joints], [leaf.grad for _, leaf in joints]
            )

    def _cut(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        self._joints.append((tensor, tensor.detach().requires_grad_()))
        return self._joints[-1][1]


def read_prefix(model: Any, prompts: Sequence[list[int]]) -> Prefix | None:
    """Let a model read the tokens that all prompts begin with, without the last token of the shortest prompt.

    Args:
        model: any `AutoModelForCausalLM`, or a module with the same forward.
        prompts: token ids.

    Returns:
        None for fewer than two prompts, for prompts that share no first token, and for a model without a
        cache from which it can continue.
    """
    parameters = inspect.signature(model.forward).parameters
    # transformers renamed the argument in 5.24
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
