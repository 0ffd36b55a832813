"""PEFT adapters with random factors."""

import peft
import torch
from transformers import AutoModelForCausalLM


def train(base, out, seed, **settings):
    """Write an adapter with random factors; gives the change that it makes, by weight."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], **settings}
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(out)
    merged = adapted.merge_and_unload().state_dict()
    change = {name: merged[name] - before[name] for name in before}
    return {name: tau for name, tau in change.items() if tau.any()}
