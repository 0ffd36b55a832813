"""Checkpoints with code of their own, as some base models have it, and planted code that leaves a mark."""

import json

_CONFIGURATION = """{mark}
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
_LAYERS = """{mark}
from transformers import LlamaForCausalLM as Parent
"""
_MODELING = """{mark}
from .configuration_own import OwnConfig
from .layers_own import Parent


class OwnForCausalLM(Parent):
    config_class = OwnConfig
"""
_TOKENIZATION = """{mark}
from transformers import PreTrainedTokenizerFast


class OwnTokenizerFast(PreTrainedTokenizerFast):
    own = True
"""
_MARK = """import pathlib

pathlib.Path({path!r}).write_text("ran")
"""


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def give_model_code(folder, mark=None):
    """Make a checkpoint one of a model type that only files of its own define: three, as many have it."""
    names = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    edit_json(folder / "config.json", model_type="own", auto_map=names)
    files = {"configuration_own": _CONFIGURATION, "layers_own": _LAYERS, "modeling_own": _MODELING}
    _write(folder, files, mark)
    return ["config.json", *(f"{name}.py" for name in files)]


def give_tokenizer_code(folder, mark=None):
    """Make a checkpoint's tokenizer one that only a file of its own defines."""
    names = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    changes = {"tokenizer_class": "OwnTokenizerFast", "auto_map": names}
    edit_json(folder / "tokenizer_config.json", **changes)
    _write(folder, {"tokenization_own": _TOKENIZATION}, mark)
    return ["tokenizer_config.json", "tokenization_own.py"]


def _write(folder, files, mark):
    for name, text in files.items():
        leaves = "" if mark is None else _MARK.format(path=str(mark))
        (folder / f"{name}.py").write_text(text.format(mark=leaves))
