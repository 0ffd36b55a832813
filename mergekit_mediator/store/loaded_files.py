"""The names of the files that transformers, PEFT and engines read when they load a model's directory.

A file of such a name that no manifest vouches for can change every answer. A test compares the names with those
in the code of transformers and PEFT.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_model*.safetensors",
    "adapter_model*.bin",
    "consolidated*.safetensors",
    "consolidated*.pth",
    "tf_model*.h5",
    "tf_model*.h5.index.json",
    "flax_model*.msgpack",
    "flax_model*.msgpack.index.json",
)
_CONFIGURATIONS = (
    "config.json",
    "config.[0-9]*.json",  # of one version of transformers, if config.json names it
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    # Engines and older quantisers read these.
    "params.json",
    "quant_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.[0-9]*.json",  # of one version of transformers, if tokenizer_config.json names it
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer*.model",
    "tokenizer*.model.v*",
    "tiktoken.model",
    "spm*.model",
    "spiece.model",
    "sentencepiece*.model",
    "*tekken*.json",
    "source.spm",
    "target.spm",
    "vocab.json",
    "vocab.txt",
    "vocab-src.json",
    "vocab-tgt.json",
    "target_vocab.json",
    "entity_vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "word_shape.json",
    "word_pronunciation.json",
)
_ANY_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
# Patterns of names, by folder; loading reads no other folder.
_MODEL = {
    ".": (*_WEIGHTS, *_CONFIGURATIONS, *_TOKENIZERS),
    "additional_chat_templates": ("*.jinja",),
    "chat_templates": ("*.jinja",),
    "custom_generate": ("generate.py", "requirements.txt"),
    "mediator": _ANY_WEIGHTS,
    "mediator/experts": _ANY_WEIGHTS,
}
_OTHERS = {
    ".": (*_ANY_WEIGHTS, "*.model", "*.model.v*", "*.tiktoken", "*.py"),
    "custom_generate": ("*.py",),
}
FOLDERS = tuple(_MODEL)


def is_of_a_model(name: str) -> bool:
    """Tell whether a file of this name can only belong to a model.

    Args:
        name: a path inside the model's directory.
    """
    return _matches(name, _MODEL)


def is_loaded(name: str) -> bool:
    """Tell whether loading may read a file of this name, be it the model's or the user's own weights or code.

    Args:
        name: a path inside the model's directory.
    """
    return _matches(name, _MODEL) or _matches(name, _OTHERS)


def loaded_files(root: Path) -> Iterator[str]:
    """Yield the files of a directory that loading may read, as paths inside it."""
    for folder in FOLDERS:
        if (root / folder).is_dir():
            for path in sorted((root / folder).iterdir()):
                name = path.relative_to(root).as_posix()
                if is_loaded(name) and not path.is_dir():
                    yield name


def _matches(name: str, by_folder: dict[str, tuple[str, ...]]) -> bool:
    path = PurePosixPath(name)
    patterns = by_folder.get(path.parent.as_posix(), ())
    # Some file systems do not tell cases apart.
    return any(fnmatchcase(path.name.casefold(), pattern) for pattern in patterns)
