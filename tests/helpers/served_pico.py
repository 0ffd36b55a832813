"""A pico artifact that vLLM serves: three adapters of one base, calibrated on words of their own."""

import json

import adapters
import pico
import torch
import transformers

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"math": 2, "code": 3, "chat": 4}
WORDS = {"math": range(0, 6), "code": range(20, 26), "chat": range(40, 46)}


def wide_llama():
    """vLLM's kernels on CPUs take heads of 32 values or more."""
    return pico.llama(
        hidden_size=64, head_dim=32, intermediate_size=96, max_position_embeddings=256
    )


def wide_qwen2():
    """A model with biases, of whose embedding and head vLLM takes no adapters."""
    settings = {**pico.SMALL, "hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
    settings["max_position_embeddings"] = 256
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))


def config(family, folder):
    """The merge configuration of three adapters with random factors."""
    models = []
    for seed, (name, rank) in enumerate(RANKS.items()):
        settings = {"r": rank, "lora_alpha": 4 * rank, "target_modules": MODULES}
        adapters.train(family.base, folder / name, seed, **settings)
        models.append({"model": f"{family.base}+{folder / name}", "parameters": {"expert": name}})
    return {"merge_method": "mediator", "base_model": str(family.base), "models": models}


def prompts(name, count, seed=0):
    """Texts of an expert's own words."""
    words = torch.tensor(WORDS[name])
    generator = torch.Generator().manual_seed(1000 * seed + len(name) + words[0].item())
    picks = words[torch.randint(len(words), (count, 6), generator=generator)].tolist()
    return [" ".join(f"w{i}" for i in row) for row in picks]


def calibrate(out, folder):
    """Fit the router that needs the embedding table alone."""
    from mergekit_mediator.models.loading import load_plain, load_tokenizer
    from mergekit_mediator.route.calibrate import calibrate_artifact

    files = {}
    for name in WORDS:
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("\n".join(json.dumps({"prompt": p}) for p in prompts(name, 20)))
    calibrate_artifact(out, load_plain(out), load_tokenizer(out), files, kind="embedding")
    return out
