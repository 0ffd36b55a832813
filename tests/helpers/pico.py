"""Pico models built in code: every architecture family that the tests merge, with a tokenizer to match."""

import copy
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
VOCABULARY = len(SPECIAL) + len(WORDS)

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(tied: bool = False, **changes) -> nn.Module:
    settings = {**SMALL, "tie_word_embeddings": tied, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def llama_tied() -> nn.Module:
    return llama(tied=True)


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL))


def gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(**SMALL, sliding_window=16)
    return transformers.Gemma3ForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=64, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


ARCHITECTURES = {
    "llama": llama,
    "llama_tied": llama_tied,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "qwen3_moe": qwen3_moe,
}


def tokenizer(extra: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerBase:
    """One token per word, with a chat template; `extra` words come after the common ones."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *extra])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def perturbed(base: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A fine-tune: a change that all share, and one of its own that grows with depth."""
    expert = copy.deepcopy(base)
    common = torch.Generator().manual_seed(99)
    own = torch.Generator().manual_seed(seed)
    parameters = list(expert.parameters())
    with torch.no_grad():
        for depth, parameter in enumerate(parameters):
            shared = torch.randn(parameter.shape, generator=common)
            private = torch.randn(parameter.shape, generator=own)
            change = shared + (0.2 + 2 * depth / len(parameters)) * private
            parameter.copy_(parameter.float() + size * change)
    return expert


def save_family(
    root: Path,
    make=llama,
    experts: tuple[str, ...] = ("math", "code", "chat"),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    size: float = 0.05,
    **options,
) -> dict[str, Path]:
    """Write a base and its experts as ordinary checkpoints; gives their directories by name."""
    torch.manual_seed(seed)
    base = make().to(dtype)
    family = {"base": base}
    family.update({n: perturbed(base, 100 + i, size) for i, n in enumerate(experts)})
    paths = {}
    for name, model in family.items():
        paths[name] = root / name
        model.save_pretrained(paths[name], **options)
        tokenizer().save_pretrained(paths[name])
    return paths
