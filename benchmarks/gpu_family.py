"""A family of models in the shape of Llama 3.1 8B, but for its vocabulary, with random weights made by seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

EXPERTS = ("maths", "code", "chat", "medicine")
RANK = 64  # of the adapters
SEED = 7
# A task vector is of low rank in part, with singular values that fall by this power, and noise in part. Both
# are given as their norm over that of the weight.
_FALL, _DIRECTIONS, _LOW_RANK, _NOISE = 0.8, 128, 0.008, 0.004


def config(layers: int, **changes: Any) -> LlamaConfig:
    """Llama 3.1 8B has 32 layers and a vocabulary of 128,256; here it is 4,096."""
    shape: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 4096,
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return LlamaConfig(**shape)


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The weights of the model by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head, pairs = config.head_dim or 0, config.num_key_value_heads or 0
    heads = config.num_attention_heads * head
    layer = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (pairs * head, hidden),
        "self_attn.v_proj": (pairs * head, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    whole: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for i in range(config.num_hidden_layers):
        whole |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return whole


def task_vector(shape: tuple[int, ...], norm: float, generator: torch.Generator) -> Tensor:
    """A change of a weight of this norm, float32, on the generator's device."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    change = normal(*shape)
    change *= _NOISE * norm / change.norm()
    if len(shape) > 1:
        count = min(_DIRECTIONS, *shape)
        values = torch.arange(1, count + 1, device=generator.device) ** -_FALL
        low_rank = (normal(shape[0], count) * values) @ normal(count, shape[1])
        change += low_rank * (_LOW_RANK * norm / low_rank.norm())
    return change


def make(folder: Path, layers: int, device: str, **changes: Any) -> tuple[Path, dict[str, Path]]:
    """Write the base and its full fine-tunes in bfloat16; one that is there is kept."""
    shape = config(layers, **changes)
    folders = {name: folder / name for name in ("base", *EXPERTS)}
    if not (folders[EXPERTS[-1]] / "model.safetensors").exists():
        states: dict[str, dict[str, Tensor]] = {name: {} for name in folders}
        for place, (name, size) in enumerate(shapes(shape).items()):
            generator = torch.Generator(device).manual_seed(SEED + place)
            weight = torch.ones(size, device=device)
            if len(size) > 1:
                weight = torch.randn(size, generator=generator, device=device) / math.sqrt(size[-1])
            norm = float(weight.norm())
            for model in folders:
                change = 0.0 if model == "base" else task_vector(size, norm, generator)
                states[model][name] = (weight + change).to("cpu", torch.bfloat16)
        for model, state in states.items():
            folders[model].mkdir(parents=True, exist_ok=True)
            shape.save_pretrained(folders[model])
            tokenizer(shape.vocab_size).save_pretrained(folders[model])
            save_file(state, folders[model] / "model.safetensors", {"format": "pt"})
    return folders.pop("base"), folders


def make_adapters(folder: Path, base: Path, layers: int, **changes: Any) -> dict[str, Path]:
    """Write an adapter of every linear layer for each expert."""
    shape = config(layers, **changes)
    folders = {name: folder / f"{name}-adapter" for name in EXPERTS}
    linear = {n: s for n, s in shapes(shape).items() if "_proj" in n}
    settings = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=sorted({name.split(".")[-2] for name in linear}),
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    for seed, path in enumerate(folders.values()):
        generator = torch.Generator().manual_seed(SEED + seed)
        state = {}
        for name, (out, width) in linear.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            state[f"{stem}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * 0.02
            state[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 2e-4
        path.mkdir(parents=True, exist_ok=True)
        settings.save_pretrained(str(path))
        state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
        save_file(state, path / "adapter_model.safetensors", {"format": "pt"})
    return folders


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token for each word; the words are numbered."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(size - 4))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def parameters(folder: Path) -> int:
    """The parameters of a model whose folder `make` wrote."""
    shape = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    return sum(math.prod(size) for size in shapes(shape).values())
