"""What an artifact is compared with, merged from the same models by mergekit's own commands."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import mergekit.merge
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.scripts import extract_lora
from safetensors.torch import load_file, save_file

from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.evaluate.contenders import located
from mergekit_mediator.merge import plugin

AVERAGE = "average"
# By name mergekit's method and the coefficients that its examples and the methods' papers try.
STATIC: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    AVERAGE: ("linear", ({"weight": 1.0},)),
    "task_arithmetic": (
        "task_arithmetic",
        tuple({"weight": w, "normalize": False} for w in (0.2, 0.3, 0.5, 1.0)),
    ),
    "ties": ("ties", tuple({"weight": 1.0, "density": d} for d in (0.2, 0.5))),
    "dare_ties": (
        "dare_ties",
        tuple({"weight": w, "density": 0.5, "normalize": False} for w in (0.3, 0.5)),
    ),
    "della": (
        "della",
        tuple(
            {"weight": w, "density": 0.5, "epsilon": 0.1, "normalize": False} for w in (0.3, 0.5)
        ),
    ),
}
EXTRACTED = "extract_lora"
TWIN = "twin_merging"
BY_ROUTER = "best_expert"
KNOWN = (*STATIC, EXTRACTED, TWIN, BY_ROUTER)


class Rivals:
    """Makes rivals in a folder; what is there already is used again, with the time that it took."""

    def __init__(
        self,
        base: str,
        experts: Mapping[str, str],
        work: Path,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            base: a directory or a repository on the Hub.
            experts: by name, in mergekit's notation: a model, or `model+adapter`.
            work: the folder.
            trust_remote_code: let code run that comes with the models.

        Raises:
            InputError: a model that is a path, and not on this machine.
        """
        self.base, self._work = located("the base", base), work
        self.experts = {name: located(f"expert {name}", e) for name, e in experts.items()}
        self._options = MergeOptions(
            lora_merge_cache=str(work / "adapters"),
            trust_remote_code=trust_remote_code,
            random_seed=0,
            write_model_card=False,
            quiet=True,
        )

    def static(self, method: str, coefficients: Mapping[str, Any]) -> tuple[Path, float]:
        """A merge of all experts by one of `STATIC`; gives its folder, and the CPU seconds it took."""
        config: dict[str, Any] = {
            "merge_method": STATIC[method][0],
            "models": [{"model": expert} for expert in self.experts.values()],
            "parameters": dict(coefficients),
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        if method != AVERAGE:
            config["base_model"] = self.base
        return self.merged(config, described(method, coefficients).replace(" ", "-"))

    def again(self, config: Path, models: Mapping[str, str]) -> tuple[Path, float]:
        """The merge of an artifact's own configuration; gives its folder, and the CPU seconds it took.

        models: where models are that are no longer where the configuration says.
        """
        parsed = yaml.safe_load(config.read_text(encoding="utf-8"))
        for entry in parsed.get("models", ()):
            entry["model"] = models.get(entry["model"], entry["model"])
        parsed["base_model"] = self.base
        return self.merged(parsed, "mediator")

    def merged(self, config: Mapping[str, Any], label: str) -> tuple[Path, float]:
        """The merge of a configuration; gives its folder, and the CPU seconds it took."""

        def merge(out: Path) -> None:
            plugin.install()
            parsed = MergeConfiguration.model_validate(dict(config))
            mergekit.merge.run_merge(parsed, str(out), options=self._options)

        return self._made(label, merge)

    def adapter(self, expert: str, reference: str, rank: int, label: str) -> tuple[Path, float]:
        """`mergekit-extract-lora` of an expert from a reference, embeddings too.

        Gives the adapter's folder, and the CPU seconds it took.
        """

        def extract(out: Path) -> None:
            given = {"--model": self.experts[expert], "--base-model": reference}
            given |= {"--out-path": str(out), "--max-rank": str(rank)}
            given |= {"--lora-merge-cache": str(self._options.lora_merge_cache)}
            arguments = [text for pair in given.items() for text in pair]
            # what is tied to the embeddings is changed with them
            flags = ["--embed-lora", "--exclude-regex", "lm_head", "--quiet"]
            flags += ["--trust-remote-code"] * self._options.trust_remote_code
            extract_lora.main([*arguments, *flags], standalone_mode=False)

        return self._made(f"{label}-{expert}-{rank}", extract)

    def _made(self, label: str, make: Callable[[Path], None]) -> tuple[Path, float]:
        out, note = self._work / label, self._work / f"{label}.json"
        if not note.exists():
            # of the processor: that other programs run on the machine too does not change it
            began = time.process_time()
            try:
                make(out)
            except (OSError, RuntimeError, ValueError, KeyError, click.ClickException) as error:
                raise InputError(f"rival {label}: mergekit: {first_line(error)}") from error
            note.write_text(json.dumps({"seconds": time.process_time() - began}))
        return out, float(json.loads(note.read_text())["seconds"])


def truncated(adapter: Path, rank: int) -> Path:
    """An extracted adapter cut to a smaller rank: singular vectors stand in the order of their values.

    It is made once; scores are remembered by its files.
    """
    out = adapter.with_name(f"{adapter.name}-to-{rank}")
    if (out / "adapter_config.json").exists():  # written last
        return out
    out.mkdir(exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": rank}
    for pattern in ("rank_pattern", "alpha_pattern"):
        config[pattern] = {m: r for m, r in config[pattern].items() if r < rank}
    cut = {}
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        part = weight[:rank] if "_A" in name else weight[:, :rank] if "_B" in name else weight
        cut[name] = part.contiguous()
    save_file(cut, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def described(method: str, coefficients: Mapping[str, Any]) -> str:
    """A merge in a few words, such as `ties weight 1.0 density 0.2`."""
    numbers = {k: v for k, v in coefficients.items() if not isinstance(v, bool)}
    return " ".join([method, *(f"{name} {value}" for name, value in numbers.items())])


def known(names: Sequence[str]) -> tuple[str, ...]:
    """The rivals of these names; `all` is every one.

    Raises:
        InputError: a name that is none's.
    """
    chosen = KNOWN if list(names) == ["all"] else tuple(filter(None, map(str.strip, names)))
    for name in chosen:
        if name not in KNOWN:
            raise InputError(f"rival {name!r}: unknown: choose of {', '.join(KNOWN)}, or all")
    return chosen
