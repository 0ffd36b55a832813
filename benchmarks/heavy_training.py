"""Training of heavy fine-tunes, which goes on from where it was interrupted."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from heavy_texts import ROW, Rows
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm
from train_experts import COMPUTES_IN_BFLOAT16
from trained_parts import SEED, masks
from transformers import AutoModelForCausalLM, AutoTokenizer

SAVED_EVERY = 300  # seconds


@dataclass(frozen=True)
class Recipe:
    """One expert: its text, the expert that it begins from, and the share of parameters that may change."""

    text: str
    begins: str | None = None
    share: float = 1.0


RECIPES = {
    "python": Recipe("python"),
    "german": Recipe("german"),
    "reasoning": Recipe("reasoning"),
    "german-after-python": Recipe("german", begins="python"),
    "python-sparse": Recipe("python", share=0.15),
}


def losses(model: Any, rows: Tensor) -> Tensor:
    """The mean loss in nats of the tokens of rows `[n, ROW]`."""
    states = model.model(input_ids=rows, use_cache=False).last_hidden_state
    # without the last token, whose logits would have to be copied out
    logits = model.lm_head(states[:, :-1].flatten(0, 1))
    return cross_entropy(logits.float(), rows[:, 1:].flatten())


def _normalise_at_once(model: Any) -> None:
    """Let the norms of a Llama run in one kernel instead of six."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            shape, epsilon = module.weight.shape, module.variance_epsilon
            module.forward = partial(
                rms_norm, normalized_shape=shape, weight=module.weight, eps=epsilon
            )


class Training:
    """A model, its optimizer and the rows that it has seen; written to a file, and read from there.

    The model computes in bfloat16 where the processor does. The optimizer holds the weights in float32.
    """

    def __init__(self, begin: Path, path: Path, lr: float, device: str) -> None:
        small = torch.device(device).type == "cuda" or COMPUTES_IN_BFLOAT16
        dtype = torch.bfloat16 if small else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(begin, dtype=dtype)
        self.model = model.to(device)
        _normalise_at_once(self.model)
        self.computed = dict(self.model.named_parameters())
        self.parameters = {n: p.detach().float().clone() for n, p in self.computed.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True
        )
        self.path, self.lr, self.step = path, lr, 0
        if path.exists():
            self._read()

    def update(self, rows: Tensor, allowed: dict[str, Tensor], rate: float) -> Tensor:
        """Take a step. Nothing here waits for the device, neither for the loss that it gives back."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        loss = losses(self.model, rows)
        loss.backward()
        for name, computed in self.computed.items():
            self.parameters[name].grad = computed.grad.float()
            computed.grad = None
        for name, mask in allowed.items():
            self.parameters[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._compute_with_these()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def _compute_with_these(self) -> None:
        torch._foreach_copy_(list(self.computed.values()), list(self.parameters.values()))

    def write(self) -> None:
        state = self.optimizer.state
        tensors = {
            f"{part} {name}": state[p][part] if part != "weight" else p.detach()
            for name, p in self.parameters.items()
            for part in ("weight", "exp_avg", "exp_avg_sq")
        }
        partial = self.path.with_suffix(".partial")
        save_file({k: v.cpu() for k, v in tensors.items()}, partial, {"step": str(self.step)})
        partial.replace(self.path)

    @torch.no_grad()
    def _read(self) -> None:
        with safe_open(self.path, "pt") as file:
            self.step = int(file.metadata()["step"])
            for name, p in self.parameters.items():
                p.copy_(file.get_tensor(f"weight {name}"))
                moments = {
                    part: file.get_tensor(f"{part} {name}").to(p.device)
                    for part in ("exp_avg", "exp_avg_sq")
                }
                # on the device, where a fused step wants it
                step = torch.tensor(float(self.step), device=p.device)
                self.optimizer.state[p] = {"step": step, **moments}
        self._compute_with_these()


def train(name: str, args: argparse.Namespace, train_rows: Rows) -> None:
    """Fine-tune one expert, and save it in bfloat16 with expert.json."""
    recipe, out = RECIPES[name], args.out / name
    out.mkdir(parents=True, exist_ok=True)
    begin = args.out / (recipe.begins or "base")
    training = Training(begin, out / "training.safetensors", args.lr, args.device)
    allowed = masks(training.model, recipe.share)
    steps = math.ceil(args.tokens / (ROW * args.batch))
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(SEED))
    tokens = torch.from_numpy(train_rows).to(args.device)
    began = saved = time.monotonic()
    done = training.step / steps
    while done < 1:
        first = training.step * args.batch
        # text that is too short is read again
        chosen = order[torch.arange(first, first + args.batch) % len(order)]
        warm = min(1.0, (training.step + 1) / min(50, 1 + steps // 10))
        rate = warm * max(0.05, 0.5 * (1 + math.cos(math.pi * done)))
        loss = training.update(tokens[chosen.to(tokens.device)].long(), allowed, rate)
        if training.step % 50 == 0:
            found = f"loss {float(loss):.3f}, {time.monotonic() - began:.0f} s"
            print(f"{name} {training.step} of {steps}: {found}", flush=True)
        # the device may be a step behind
        done = max(training.step / steps, (time.monotonic() - began) / args.seconds)
        if time.monotonic() - saved > SAVED_EVERY:
            training.write()
            saved = time.monotonic()
    training.model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(begin).save_pretrained(out)
    read = training.step * ROW * args.batch
    notes = {
        "tokens": read,
        "distinct_tokens": min(train_rows.size, read),
        "begins": recipe.begins or "base",
        "lr": args.lr,
        "batch": args.batch,
        "training_seconds": round(time.monotonic() - began),
        "share_that_may_change": recipe.share,
    }
    # written last: its presence says that the folder is complete
    (out / "expert.json").write_text(json.dumps(notes, indent=1) + "\n")
    training.path.unlink(missing_ok=True)
