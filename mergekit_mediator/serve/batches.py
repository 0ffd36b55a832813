"""Turn prompts in any form that users have into token ids and attention mask of one checked batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_mediator.errors import RoutingError
from mergekit_mediator.models.prompts import pad_token, render


class Batches:
    """Make batches for one model."""

    def __init__(self, root: Path, model: Any, tokenizer: Any) -> None:
        """Make batches for a model and its tokenizer.

        Args:
            root: the artifact's directory, for error messages.
            model: the transformers model.
            tokenizer: the artifact's tokenizer, or None.
        """
        self._root, self._model, self._tokenizer = root, model, tokenizer

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize texts and pad them on the left; a chat template is applied if there is one.

        Returns:
            Token ids and attention mask, int64 `[batch, length]`.

        Raises:
            RoutingError: there is no prompt, a prompt is empty, or the artifact has no tokenizer.
        """
        if self._tokenizer is None:
            raise RoutingError(
                f"{self._root}: the artifact has no tokenizer: give token ids instead of text"
            )
        if not prompts:
            raise RoutingError("prompts: at least one prompt is required, got none")
        if not all(prompt.strip() for prompt in prompts):
            raise RoutingError("an empty prompt cannot be routed: give it text, or name a mixture")
        return self.pad([render(self._tokenizer, prompt) for prompt in prompts])

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad rows of any lengths on the left: token ids and attention mask, int64 `[batch, length]`."""
        tensors = [torch.tensor(row) for row in rows]
        pad: Any = {"batch_first": True, "padding_side": "left"}
        ids = torch.nn.utils.rnn.pad_sequence(tensors, padding_value=pad_token(self._model), **pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], **pad)
        return ids, mask

    def tokens(self, prompts: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check prompts and move them to the model's device.

        Args:
            prompts: texts, token ids `[batch, length]`, or a tokenizer's output.
            attention_mask: `[batch, length]`, 0 for padding; it comes with token ids.

        Returns:
            Token ids and attention mask `[batch, length]`.

        Raises:
            RoutingError: there is no prompt, a shape does not fit, or a prompt is longer than the model's
                context.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, Mapping):
            prompts, attention_mask = prompts["input_ids"], prompts.get("attention_mask")
        if prompts is None:
            raise RoutingError(
                "input_ids are required, got none: to generate from inputs_embeds, enter "
                "`with model.mixture(...)` first"
            )
        if not isinstance(prompts, Tensor):
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise RoutingError(
                    "prompts: texts, or a tensor of token ids [batch, length] are required: lists of "
                    "ids become one batch with `model.mediator.pad`"
                )
            prompts, attention_mask = self.tokenize(prompts)
        ids = prompts.to(self._model.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
        if ids.ndim != 2 or not len(ids):
            raise RoutingError(
                f"token ids: shape [batch, length] is required, got {list(ids.shape)}"
            )
        if ids.shape != mask.shape:
            raise RoutingError(
                f"attention_mask: shape {list(ids.shape)} is required, got {list(mask.shape)}"
            )
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit:
            raise RoutingError(
                f"prompt of {ids.shape[1]} tokens: this model takes at most {limit} tokens: shorten "
                "the prompt"
            )
        return ids, mask


def pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of rows `[batch, length]` to their left end."""
    if bool(mask[:, -1].all()):
        return ids, mask
    order = mask.bool().to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
