"""PEFT adapters of every kind on pico models, with random weights and PEFT's own answers."""

import copy
import warnings

import peft
import torch
from transformers import AutoModelForCausalLM

IDS = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))
_LAYERS = ("q_proj", "down_proj")


def lora(*targets, **settings):
    return peft.LoraConfig(target_modules=list(targets or _LAYERS), **{"r": 4, **settings})


def _on(config, *targets, **settings):
    return config(target_modules=list(targets or _LAYERS), **settings)


# On a Llama whose embeddings are not tied. The text is how docs/adapters.md calls the kind.
LLAMA = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "DoRA on embeddings": lora("embed_tokens", "q_proj", use_dora=True),
    "LoRA with patterns": lora(
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 9}
    ),
    "modules_to_save: head": lora(modules_to_save=["lm_head"]),
    "modules_to_save: norms": lora(modules_to_save=["input_layernorm"]),
    "LoRA on embeddings": lora("embed_tokens", "q_proj"),
    "LoRA on the head": lora("lm_head", "q_proj"),
    "trainable_token_indices": lora(trainable_token_indices=[5, 30, 40]),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=list(range(4, 30))),
    "SHiRA": _on(peft.ShiraConfig, r=2),
    "VeRA": _on(peft.VeraConfig, r=8),
    "VeRA without its projection": _on(peft.VeraConfig, r=8, save_projection=False),
    "PVeRA": _on(peft.PveraConfig, r=8),
    "IA3": _on(peft.IA3Config, feedforward_modules=["down_proj"]),
    "LoHa": _on(peft.LoHaConfig, r=4),
    "LoKr": _on(peft.LoKrConfig, r=4),
    "OFT": _on(peft.OFTConfig, oft_block_size=4),
    "BOFT": _on(peft.BOFTConfig, boft_block_size=4),
    "AdaLoRA": _on(peft.AdaLoraConfig, init_r=6, target_r=4, total_step=10),
    "HRA": _on(peft.HRAConfig, r=4),
    "FourierFT": _on(peft.FourierFTConfig, n_frequency=20),
    "C3A": _on(peft.C3AConfig, block_size=8),
    "RandLoRA": _on(peft.RandLoraConfig, r=4),
    "RoAd": _on(peft.RoadConfig, group_size=8),
    "WaveFT": _on(peft.WaveFTConfig, n_frequency=20),
    "DeLoRA": _on(peft.DeloraConfig, r=4),
    "GraLoRA": _on(peft.GraloraConfig, "q_proj", "o_proj", r=4, gralora_k=2),
    "MiSS": _on(peft.MissConfig, r=4),
    "norms (LN tuning)": _on(peft.LNTuningConfig, "input_layernorm"),
    "VB-LoRA": _on(peft.VBLoRAConfig, "q_proj", "o_proj", r=2, num_vectors=8, vector_length=8),
    "Uni-LoRA": _on(peft.UniLoraConfig, r=4),
    "HiRA": _on(peft.HiraConfig, r=4),
    "GLoRA": _on(peft.GloraConfig, r=4),
    "TinyLoRA": _on(peft.TinyLoraConfig, r=4),
    "PEANuT": _on(peft.PeanutConfig),
    "Supertuning": _on(peft.SupertuningConfig),
    "DeFT": _on(peft.DeftConfig, r=4),
}
# PEFT merges these as whole models.
WHOLE = {
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "OSF": _on(peft.OSFConfig, effective_rank=4),
    "PSOFT": _on(peft.PsoftConfig, r=4),
    "FRoD": _on(peft.FrodConfig),
    "AdaMSS": _on(peft.AdamssConfig, r=4),
}
# On a GPT-2, whose linear layers have biases and transposed matrices.
GPT2 = {
    "LoRA of transposed matrices": lora("c_attn", fan_in_fan_out=True),
    "DoRA of transposed matrices": lora("c_attn", use_dora=True, fan_in_fan_out=True),
    "lora_bias": lora("c_attn", lora_bias=True, fan_in_fan_out=True),
    "bias: all": lora("c_attn", bias="all", fan_in_fan_out=True),
    "bias: lora_only": lora("c_attn", bias="lora_only", fan_in_fan_out=True),
    "IA3 with biases": _on(peft.IA3Config, "c_attn", feedforward_modules=[], fan_in_fan_out=True),
}
# On a Llama whose embeddings are tied.
TIED = {
    "LoRA on tied embeddings": lora("embed_tokens", "q_proj", ensure_weight_tying=True),
    "modules_to_save: tied embeddings": lora(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "trainable_token_indices of tied embeddings": lora(trainable_token_indices=[5, 30, 40]),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def save(base, out, config, seed=0):
    """Write an adapter whose trained weights are moved at random; gives what PEFT answers with it."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        adapted.save_pretrained(out)
    return logits(adapted)
