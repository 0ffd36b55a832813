"""The tokenizer of a checkpoint as fields of a GGUF file: byte-level BPE whose way to split text llama.cpp knows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_mediator.errors import first_line
from mergekit_mediator.export.gguf.layout import NotInGgufError, gguf_package
from mergekit_mediator.models.loading import load_tokenizer

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of ways to split text before pairs are merged, `tokenizer.ggml.pre`. The keys are the steps of
# tokenizer.json and whether a whole word skips the merges. The patterns are those that src/llama-vocab.cpp of
# llama.cpp quotes as the originals of its own. Like llama.cpp's converter, `qwen2` loses Unicode's normal form NFC.
_SPLITS = {
    (("bytes of words",), False): "gpt-2",
    (("digits", "bytes of words"), False): "smollm",
    (("NFC", _WORDS % "", "bytes"), False): "qwen2",
    ((_WORDS % "{1,3}", "bytes"), True): "llama-bpe",
}
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        split: llama.cpp's name of the way to split text.
        tokens: the text of each token, by its number.
        kinds: GGUF's kind of each token.
        merges: the pairs to merge, as `left right`.
        special: the number of each special token, by its role such as `bos`.
        adds: whether a text begins with the token `bos` and ends with `eos`.
        template: the chat template, several by name, or None.
    """

    split: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    template: str | Mapping[str, str] | None

    @classmethod
    def of(cls, root: Path, size: int) -> "Vocabulary":
        """Read the tokenizer of a checkpoint.

        Args:
            root: the checkpoint's directory.
            size: the number of rows of the embedding.

        Raises:
            NotInGgufError: the tokenizer is no byte-level BPE, splits text in a way that has no name in llama.cpp, or
                adds other tokens to a text than `bos` and `eos`.
        """
        path = root / "tokenizer.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            split = _split(content)
            pairs = content["model"].get("merges", ())
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise NotInGgufError(
                f"{path}: a byte-level BPE tokenizer is required: {first_line(error)}"
            ) from error
        if split is None:
            known = ", ".join(_SPLITS.values())
            raise NotInGgufError(
                f"{path}: byte-level BPE that splits text as {known} do is required, got another tokenizer"
            )
        tokenizer = load_tokenizer(root)
        tokens, kinds = _tokens(tokenizer, size, path)
        special = {role: getattr(tokenizer, f"{role}_token_id") for role in _SPECIAL}
        special = {role: number for role, number in special.items() if number is not None}
        adds = _added(tokenizer, path)
        return cls(split, tokens, kinds, merges, special, adds, tokenizer.chat_template)

    def set_fields(self, writer: Any) -> None:
        """Give a `gguf.GGUFWriter` the tokenizer's fields."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        for role, is_added in self.adds.items():
            getattr(writer, f"add_add_{role}_token")(is_added)
        if isinstance(self.template, str):
            writer.add_chat_template(self.template)
        elif self.template:
            named = [{"name": name, "template": text} for name, text in self.template.items()]
            writer.add_chat_template(named)


def _split(content: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the way in which a tokenizer.json splits text; None if it has none."""
    model = content["model"]
    affixes = [model.get(x) for x in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model["type"] != "BPE" or model.get("byte_fallback") or any(affixes) or model.get("dropout"):
        return None
    steps = [content.get("normalizer"), content["pre_tokenizer"]]
    names = tuple(name for step in steps if step for name in _step(step))
    return _SPLITS.get((names, bool(model.get("ignore_merges"))))


def _step(step: Mapping[str, Any]) -> list[str]:
    """Name the steps of a normalizer or a pre-tokenizer; one that is not known names itself."""
    match step:
        case {"type": "Sequence"}:
            parts = step.get("pretokenizers") or step.get("normalizers") or []
            return [name for part in parts for name in _step(part)]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return ["bytes of words" if splits else "bytes"]
        case {"type": "Digits", "individual_digits": True}:
            return ["digits"]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
            return [str(pattern) if not step.get("invert") else "inverted"]
        case {"type": "NFC"}:
            return ["NFC"]
    return [str(step)]


def _tokens(tokenizer: Any, size: int, path: Path) -> tuple[list[str], list[int]]:
    """Return the text and the kind of every row of the embedding.

    Raises:
        NotInGgufError: the tokenizer has more tokens than the embedding has rows.
    """
    kinds = gguf_package().TokenType
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise NotInGgufError(
            f"{path}: at most {size} tokens are required, as many as the embedding has rows, got {max(texts) + 1}"
        )
    added = tokenizer.added_tokens_decoder
    found = []
    for number in range(size):
        kind = kinds.NORMAL if number in texts else kinds.UNUSED
        if number in added:
            kind = kinds.CONTROL if added[number].special else kinds.USER_DEFINED
        found.append((texts.get(number, f"[PAD{number}]"), int(kind)))
    return [text for text, _ in found], [kind for _, kind in found]


def _added(tokenizer: Any, path: Path) -> dict[str, bool]:
    """Tell whether `bos` and `eos` are added to a text.

    Raises:
        NotInGgufError: other tokens are added.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            first, last = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
            if whole == [*first, *plain, *last]:
                return {"bos": bos, "eos": eos}
    raise NotInGgufError(
        f"{path}: the text {plain} becomes {whole}, and bos and eos alone may be added"
    )
