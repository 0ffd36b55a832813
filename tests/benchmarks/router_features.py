"""What routers see of a prompt: its token ids, mean embedding or mean hidden state."""

import time
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.calibrated import hidden_layer, mean_hidden
from mergekit_mediator.prompts import render


class Model:
    """A dense expert in bfloat16, up to the layer that hidden features are taken from."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.model = causal.model
        self.table: Tensor = causal.get_input_embeddings().weight.detach()
        self.layer = hidden_layer(len(self.model.layers))
        self.every_layer = self.model.layers
        self.norm = self.model.norm
        pairs = zip(self.ids(""), self.ids("x"), strict=False)
        self.opening = len([a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)])

    def ids(self, prompt: str) -> list[int]:
        return render(self.tokenizer, prompt)

    @torch.no_grad()
    def hidden(self, rows: list[list[int]], batch: int = 16) -> Tensor:
        """Mean hidden states `[n, d]`; rows of like length run together."""
        self.model.layers, self.model.norm = self.every_layer[: self.layer], nn.Identity()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        result: dict[int, Tensor] = {}
        for start in range(0, len(rows), batch):
            part = order[start : start + batch]
            width = len(rows[part[-1]])
            ids = torch.zeros(len(part), width, dtype=torch.int64)
            mask = torch.zeros(len(part), width, dtype=torch.int64)
            for row, i in enumerate(part):
                ids[row, : len(rows[i])] = torch.tensor(rows[i])
                mask[row, : len(rows[i])] = 1
            states = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            counted = mask.bool()
            counted[:, : self.opening] = False
            result |= dict(zip(part, mean_hidden(states.last_hidden_state, counted), strict=True))
        self.model.layers, self.model.norm = self.every_layer, self.norm
        return torch.stack([result[i] for i in range(len(rows))])

    @torch.no_grad()
    def prefill_ms(self, rows: list[list[int]], partial: bool) -> list[float]:
        """Milliseconds of one pass for each row alone, whole or up to the hidden layer."""
        if partial:
            self.model.layers = self.every_layer[: self.layer]
        times = []
        for row in rows:
            began = time.perf_counter()
            self.model(input_ids=torch.tensor([row]), use_cache=False)
            times.append(1000 * (time.perf_counter() - began))
        self.model.layers = self.every_layer
        return times
