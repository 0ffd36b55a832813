"""What routers see of a prompt: its token ids, mean embedding or hidden states; kept on disk."""

import hashlib
import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.models.contexts import Contexts
from mergekit_mediator.models.prompts import render
from mergekit_mediator.route.calibrated import CalibratedRouter
from mergekit_mediator.route.features import SUMMARY, hidden_features, hidden_layers

Rows = dict[str, list[list[int]]]
Features = dict[str, Tensor]


class Model:
    """A dense expert in its stored dtype."""

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        self.table: Tensor = self.model.get_input_embeddings().weight.detach()
        self.layers = hidden_layers(self.model.config.num_hidden_layers)
        self.summary = torch.tensor(self.tokenizer(SUMMARY, add_special_tokens=False).input_ids)
        self.contexts = Contexts(self.tokenizer)
        self._cache = cache

    @cached_property
    def opening(self) -> int:
        """How many tokens every prompt begins with."""
        return len(self.contexts.opening)

    def ids(self, prompt: str) -> list[int]:
        return render(self.tokenizer, prompt)

    def rows(self, texts: Mapping[str, list[str]]) -> Rows:
        return {task: [self.ids(p) for p in prompts] for task, prompts in texts.items()}

    def hidden(self, groups: Rows) -> Features:
        """By task, `[n, d]`, from the cache where it has them."""
        about = [self.layers, self.summary.tolist(), groups]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        path = self._cache / f"{digest}.safetensors" if self._cache else None
        if path and path.exists():
            kept = load_file(path)
            return {task: kept[task] for task in groups}
        every = [row for rows in groups.values() for row in rows]
        states = self._hidden(every).split([len(rows) for rows in groups.values()])
        made = dict(zip(groups, states, strict=True))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({task: x.contiguous() for task, x in made.items()}, path)
        return made

    def _hidden(self, rows: list[list[int]], batch: int = 8) -> Tensor:
        """Rows of like length run together."""
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
            result |= dict(zip(part, self.features(ids, mask), strict=True))
        return torch.stack([result[i] for i in range(len(rows))])

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        counted = self.contexts.counted(ids, mask)
        return hidden_features(self.model, ids, mask, counted, self.summary, self.layers)

    @torch.no_grad()
    def milliseconds(
        self, router: CalibratedRouter, rows: list[list[int]]
    ) -> tuple[list[float], list[float]]:
        """Of each request alone: a prefill, and a decision by its hidden states; in turns."""
        prefills, decisions = [], []
        for row in rows:
            ids = torch.tensor([row])
            mask = torch.ones_like(ids)
            times = []
            for routed in (False, True):
                began = time.perf_counter()
                if routed:
                    router.decide(self.features(ids, mask))
                else:
                    self.model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
                times.append(1000 * (time.perf_counter() - began))
            prefills.append(times[0])
            decisions.append(times[1])
        return prefills, decisions
