"""The loss of a model whose routed layers are an expert's and whose other layers are the average's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from artifacts import score_packed
from torch import Tensor
from train_experts import Pair
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

Layers = frozenset[str]


class Patchwork:
    """Two models of one architecture (Llama's or Gemma's), and a choice of whose layer is run at each place.

    What the layers before the first change of models give is kept for every batch, so that
    patching layer i of n costs n - i layers.

    Args:
        average, expert: causal language models of transformers with tied embeddings.
    """

    def __init__(self, average: Any, expert: Any) -> None:
        self.sources = (average, expert)
        self.layers = layer_names(average)
        self.routed: Layers = frozenset()
        self._inputs: dict[tuple[Any, bool], list[Tensor]] = {}

    def model(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool,
    ) -> SimpleNamespace:
        """As a model's `model`: the normed hidden states of tokens `[1, n]`, as `last_hidden_state`."""
        embed, *blocks, final = [self.sources[name in self.routed].model for name in self.layers]

        def run(index: int, hidden: Tensor) -> Tensor:
            return blocks[index].layers[index](
                hidden,
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=rotary(embed, index, hidden, position_ids),
            )

        key = tuple(input_ids[0].tolist()), "embed" in self.routed
        inputs = self._inputs.setdefault(key, [embed.embed_tokens(input_ids)])
        alike = next((i for i, block in enumerate(blocks) if block is not embed), len(blocks))
        while len(inputs) <= alike:
            inputs.append(run(len(inputs) - 1, inputs[-1]))
        hidden = inputs[alike]
        for index in range(alike, len(blocks)):
            hidden = run(index, hidden)
        return SimpleNamespace(last_hidden_state=final.norm(hidden))

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits; the head is tied to the embedding and follows it."""
        logits: Tensor = self.sources["embed" in self.routed].lm_head(hidden)
        return logits


def rotary(model: Any, block: int, hidden: Tensor, positions: Tensor) -> Any:
    """The rotary embedding of a block; Gemma's depends on whether the block's attention slides."""
    if isinstance(model.rotary_emb, Gemma3RotaryEmbedding):
        return model.rotary_emb(hidden, positions, model.config.layer_types[block])
    return model.rotary_emb(hidden, position_ids=positions)


class Losses:
    """Losses of one task's prompts under any routed layers; each is computed once and kept."""

    def __init__(self, path: Path, pairs: Sequence[Pair]) -> None:
        """
        Args:
            path: a JSON file that need not exist yet.
            pairs: the task's prompts and answers.
        """
        self.path, self.pairs = path, pairs
        self.known: dict[str, list[list[float]]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def measure(self, average: Any, expert: Any, choices: Iterable[Layers]) -> None:
        """Score what is not known yet."""
        patchwork = Patchwork(average, expert)
        for routed in sorted(set(choices), key=sorted):
            if _key(routed) in self.known:
                continue
            patchwork.routed = routed
            answers = score_packed(patchwork, self.pairs)
            self.known[_key(routed)] = [[a.log_likelihood, a.tokens, a.right] for a in answers]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.known))

    def loss(self, routed: Layers, part: slice = slice(None)) -> float:
        """Nats per answer token over these prompts."""
        answers = self.known[_key(routed)][part]
        return -sum(a[0] for a in answers) / sum(a[1] for a in answers)

    def accuracy(self, routed: Layers) -> float:
        """Share of answers that are right."""
        answers = self.known[_key(routed)]
        return sum(a[2] for a in answers) / len(answers)


def recovered(losses: Iterable[Losses], routed: Layers, everything: Layers, **part: slice) -> float:
    """The share of the loss between average (0) and experts (1) that routing takes away, over all tasks."""
    losses = list(losses)
    none, some, full = (
        sum(task.loss(layers, **part) for task in losses)
        for layers in (frozenset[str](), routed, everything)
    )
    return (none - some) / (none - full)


def layer_names(model: Any) -> list[str]:
    """`embed`, the number of every block, `final`."""
    return ["embed", *map(str, range(len(model.model.layers))), "final"]


def _key(routed: Layers) -> str:
    return ",".join(sorted(routed))
