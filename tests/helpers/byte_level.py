"""Pico models with a byte-level BPE tokenizer, which llama.cpp knows, as real models have."""

import json

import pico
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The 7 cats' hats, it's 1234 of them!  Don't\n\n they'll say “naïve” 東京 — ",
    "def f(x):\n\treturn x ** 2  # 3.14\r\n",
]
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>"]
VOCABULARY = 320
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splitting(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _words():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# By llama.cpp's name: as the tokenizers of GPT-2, SmolLM, Qwen2 and Llama 3 split text.
SPLITS = {
    "gpt-2": _words,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _words()]),
    "qwen2": lambda: _splitting(WORDS % ""),
    "llama-bpe": lambda: _splitting(WORDS % "{1,3}"),
}


def tokenizer(split="smollm", adds_bos=False):
    """A tokenizer trained on two lines, with a chat template."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = SPLITS[split]()
    if split == "qwen2":
        plain.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    plain.train_from_iterator(TEXT * 3, trainer)
    if split == "llama-bpe":
        content = json.loads(plain.to_str())
        content["model"]["ignore_merges"] = True
        plain = Tokenizer.from_str(json.dumps(content))
    if adds_bos:
        plain.post_processor = processors.TemplateProcessing(
            "<|begin|> $A", None, [("<|begin|>", 1)]
        )
    pad, bos, eos = SPECIAL
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=pad, bos_token=bos, eos_token=eos
    )
    fast.chat_template = (
        "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
    )
    return fast


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama(**changes):
    return pico.llama(**{**SIZES, **changes})


def llama3(**changes):
    """A llama whose long waves turn more slowly, as those of Llama 3.1."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return llama(rope_parameters=rope, **changes)


def mistral():
    config = transformers.MistralConfig(**{**pico.SMALL, **SIZES}, sliding_window=None)
    return transformers.MistralForCausalLM(config)


def qwen2(tied=True):
    config = transformers.Qwen2Config(**{**pico.SMALL, **SIZES}, tie_word_embeddings=tied)
    return transformers.Qwen2ForCausalLM(config)


def qwen3(tied=True):
    config = transformers.Qwen3Config(**{**pico.SMALL, **SIZES}, tie_word_embeddings=tied)
    return transformers.Qwen3ForCausalLM(config)


def with_tokenizer(family, split="smollm", **options):
    """Give base and experts of a family this tokenizer."""
    for path in (family.base, *family.experts.values()):
        tokenizer(split, **options).save_pretrained(path)
    return family
