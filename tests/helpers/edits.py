"""Artifacts to change, and what must hold of them after a change."""

import json
import shutil
import warnings

import pico
import torch
from served_pico import WORDS, prompts

from mergekit_mediator import MediatorModel
from mergekit_mediator.models.loading import DenseCheckpoint, load_plain, load_tokenizer
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.store.expert_file import open_expert
from mergekit_mediator.store.manifest import MANIFEST, PICTURES, read_manifest
from mergekit_mediator.store.verification import verify_files

NAMES = ("math", "code", "chat")
# The forms of experts by name: relative to the dense expert or to the base, with and without averaged layers.
FORMS = {
    "density": {"density": 0.5, "route": "all"},
    "bits": {"bits": 4, "route": "all"},
    "averaged": {"bits": 4, "routed_layers": "0-1"},
    "base": {"bits": 4, "reference": "base", "route": "all"},
}


def build(root, family, **parameters):
    """Merge a family; gives the artifact's directory."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    config = MergeConfiguration.model_validate(family.config(**parameters))
    run(config, str(root), MergeOptions(quiet=True), overwrite=True)
    return root


def data(folder, names=NAMES):
    """By expert, a file of 20 prompts of its own words; experts that no helper knows get words 50 to 55."""
    files = {}
    for name in names:
        words = WORDS.get(name, range(50, 56))
        files[name] = folder / f"{name}.jsonl"
        texts = prompts(name, 20) if name in WORDS else [f"w{a} w{b}" for a in words for b in words]
        files[name].write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return files


def calibrate(out, files, kind="embedding"):
    calibrate_artifact(out, load_plain(out), load_tokenizer(out), files, kind=kind)
    return out


def served(out, mixture):
    """The weights that answer a request with a mixture, after the artifact was loaded and verified."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MediatorModel.from_pretrained(out)
    with model.mixture(mixture) as routed:
        return {name: weight.detach().clone() for name, weight in routed.named_parameters()}


def changes(out, name):
    """The change that an expert stores, by weight."""
    manifest, dense = read_manifest(out), DenseCheckpoint(out)
    entry = next(e for e in manifest.experts if e.name == name)
    file = open_expert(out, entry, dense.shapes)
    return {w: file.read(w, dense.weight(w)).change(dense.weight(w)) for w in file.weights}


def check(out, names):
    """Check that an artifact verifies, has these experts and no other file, and routes a request to them."""
    manifest = read_manifest(out)
    verify_files(out, manifest)
    assert manifest.expert_names == tuple(names)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files - {*PICTURES} == {*manifest.files, MANIFEST, "README.md"}  # calibration draws them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MediatorModel.from_pretrained(out)
    decision = model.route(torch.tensor([[5, 6, 7]]))
    assert decision.experts == tuple(names)
    assert torch.allclose(decision.weights.sum(dim=1), torch.ones(1))
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape[1] > 3
    return manifest


def copied(source, target):
    return shutil.copytree(source, target)


def same_files(before, after, *changed):
    """Check that all files but those are the same, byte for byte."""
    for name, digest in before.files.items():
        if name not in changed:
            assert after.files[name] == digest, name


def one_more(family, folder, name="law", seed=200, dtype=None):
    """One more fine-tune of a family's base; gives its directory."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(family.base)
    expert = pico.perturbed(base, seed)
    expert.to(dtype or base.dtype).save_pretrained(folder / name)
    pico.tokenizer().save_pretrained(folder / name)
    return folder / name


def one_more_of(make, path):
    """A model of another kind; gives its directory."""
    torch.manual_seed(5)
    make().to(torch.bfloat16).save_pretrained(path)
    return path
