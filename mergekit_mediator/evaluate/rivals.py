"""Make the rivals of an artifact from the same models, with mergekit's own commands."""

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
from mergekit_mediator.evaluate.static_methods import STATIC
from mergekit_mediator.merge import plugin

EXTRACTED = "extract_lora"
TWIN = "twin_merging"
BY_ROUTER = "best_expert"
KNOWN = (*STATIC, EXTRACTED, TWIN, BY_ROUTER)


class Rivals:
    """Make rivals in a folder; a rival that is there already is used again, with its recorded time.

    Attributes:
        base: the base model.
        experts: the experts by name.
        work: the folder of the rivals.
    """

    def __init__(
        self,
        base: str,
        experts: Mapping[str, str],
        work: Path,
        trust_remote_code: bool = False,
    ) -> None:
        """Find the models.

        Args:
            base: a directory, or a repository on the Hub.
            experts: the experts by name, in mergekit's notation: a model, or `model+adapter`.
            work: the folder of the rivals.
            trust_remote_code: let the models' own code run.

        Raises:
            InputError: a model's path is not on this machine.
        """
        self.base, self.work = located("the base", base), work
        self.experts = {name: located(f"expert {name}", e) for name, e in experts.items()}
        self._options = MergeOptions(
            lora_merge_cache=str(work / "adapters"),
            trust_remote_code=trust_remote_code,
            random_seed=0,
            write_model_card=False,
            quiet=True,
        )

    def again(self, config: Path, models: Mapping[str, str]) -> tuple[Path, float]:
        """Repeat the merge of an artifact from its configuration.

        Args:
            config: the file of the configuration.
            models: the present place of each model that has moved, by its name in the configuration.

        Returns:
            The folder of the merge, and the CPU seconds that it took.

        Raises:
            InputError: mergekit refuses the merge.
        """
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        for entry in content.get("models", ()):
            entry["model"] = models.get(entry["model"], entry["model"])
        content["base_model"] = self.base
        return self.merged(content, "mediator")

    def merged(self, config: Mapping[str, Any], label: str) -> tuple[Path, float]:
        """Merge by a configuration.

        Returns:
            The folder of the merge, and the CPU seconds that it took.

        Raises:
            InputError: mergekit refuses the merge.
        """

        def merge(out: Path) -> None:
            plugin.install()
            merge_config = MergeConfiguration.model_validate(dict(config))
            mergekit.merge.run_merge(merge_config, str(out), options=self._options)

        return self._once(label, merge)

    def adapter(self, expert: str, reference: str, rank: int, label: str) -> tuple[Path, float]:
        """Run `mergekit-extract-lora` on an expert relative to a reference, with the embeddings.

        Returns:
            The folder of the adapter, and the CPU seconds that it took.

        Raises:
            InputError: mergekit refuses the extraction.
        """

        def extract(out: Path) -> None:
            options = {"--model": self.experts[expert], "--base-model": reference}
            options |= {"--out-path": str(out), "--max-rank": str(rank)}
            options |= {"--lora-merge-cache": str(self._options.lora_merge_cache)}
            arguments = [text for pair in options.items() for text in pair]
            # A tied lm_head changes with the embeddings.
            flags = ["--embed-lora", "--exclude-regex", "lm_head", "--quiet"]
            flags += ["--trust-remote-code"] * self._options.trust_remote_code
            extract_lora.main([*arguments, *flags], standalone_mode=False)

        return self._once(f"{label}-{expert}-{rank}", extract)

    def _once(self, label: str, make: Callable[[Path], None]) -> tuple[Path, float]:
        """Make a folder unless it is there; return it, and the CPU seconds that it took."""
        out, note = self.work / label, self.work / f"{label}.json"
        if not note.exists():
            # CPU time does not count the time of other programs on the machine.
            began = time.process_time()
            try:
                make(out)
            except (OSError, RuntimeError, ValueError, KeyError, click.ClickException) as error:
                raise InputError(f"rival {label}: mergekit: {first_line(error)}") from error
            note.write_text(json.dumps({"seconds": time.process_time() - began}))
        return out, float(json.loads(note.read_text())["seconds"])


def truncated(adapter: Path, rank: int) -> Path:
    """Cut an extracted adapter to a smaller rank, in a folder beside it, unless that folder is there.

    Extracted singular vectors stand in descending order of their values, so the first ones stay. Files that are
    there stay as they are, because scores are remembered by their times.
    """
    out = adapter.with_name(f"{adapter.name}-to-{rank}")
    if (out / "adapter_config.json").exists():  # this file is written last
        return out
    out.mkdir(exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": rank}
    for pattern in ("rank_pattern", "alpha_pattern"):
        config[pattern] = {m: r for m, r in config[pattern].items() if r < rank}
    tensors = {}
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        part = weight[:rank] if "_A" in name else weight[:, :rank] if "_B" in name else weight
        tensors[name] = part.contiguous()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def known(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of rivals; `all` stands for every rival.

    Raises:
        InputError: no rival has a name.
    """
    checked = KNOWN if list(names) == ["all"] else tuple(filter(None, map(str.strip, names)))
    for name in checked:
        if name not in KNOWN:
            raise InputError(f"unknown rival {name!r}: choose from {', '.join(KNOWN)}, or all")
    return checked
