"""Methods that need the models' answers to prompts, against naive oracles of their formulas."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from commands import call, figures, write
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_mediator.errors import ConfigError
from mergekit_mediator.merge.prompted import plan as prompted_plan
from mergekit_mediator.methods.with_prompts import WITH_PROMPTS
from mergekit_mediator.tune.teacher import ANSWER_TOKENS

NAMES = [method.spec.name for method in WITH_PROMPTS]
# Their formulas change what all experts agree on.
CHANGES_WHAT_ALL_AGREE_ON = {"rcp"}
PROMPTS = 6

every_method = pytest.mark.parametrize("method", NAMES)


@pytest.fixture(scope="module")
def small(make):
    return make(dtype=torch.float32)


@pytest.fixture
def asked(tmp_path):
    """Makes a configuration in which every expert has prompts of its own."""

    def config(family, method, models=None, **parameters):
        models = models or list(family.experts.values())
        entries = []
        for number, path in enumerate(models):
            file = tmp_path / f"{number}-{path.name}.jsonl"
            lines = [f"w{number} w{(7 * n + 3 * number) % 60} w{n}" for n in range(PROMPTS)]
            file.write_text("\n".join(json.dumps({"prompt": line}) for line in lines))
            entries.append({"model": str(path), "parameters": {"prompts": str(file)}})
        if method == "rcp":
            entries[0]["parameters"]["reasoning"] = True
        config = family.config(method, **parameters)
        return {**config, "models": entries, "dtype": "float32"}

    return config


def answered(path, file):
    """A model, and its own greedy answers to a file of prompts, each decoded alone."""
    model, tokenizer = (
        kind.from_pretrained(path) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    pairs = []
    for line in Path(file).read_text().splitlines():
        message = [{"role": "user", "content": json.loads(line)["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        room = min(ANSWER_TOKENS, 64 - ids.shape[1])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False
        )
        pairs.append((whole, ids.shape[1]))
    return model, pairs


def gradients(model, pairs, mean):
    """By name, the gradients of the negative log-likelihood of every answer, `[prompts, *shape]`."""
    rows = []
    for whole, start in pairs:
        model.zero_grad()
        logits = model(whole).logits[0, start - 1 : -1]
        reduction = "mean" if mean else "sum"
        torch.nn.functional.cross_entropy(logits, whole[0, start:], reduction=reduction).backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fisher(base, experts):
    information = []
    for model, pairs in experts:
        squares = {n: g.square().mean(0) for n, g in gradients(model, pairs, mean=False).items()}
        flat = torch.cat([f.flatten() for f in squares.values()])
        information.append({n: f / flat.square().mean().sqrt() + 1e-6 for n, f in squares.items()})
    merged = {}
    for name, weight in base.items():
        weights = [f[name] for f in information]
        taus = [model.state_dict()[name] - weight for model, _ in experts]
        merged[name] = weight + sum(f * t for f, t in zip(weights, taus, strict=True)) / sum(
            weights
        )
    return merged


def rcp(base, experts):
    (reasoning, pairs), *domains = experts
    own = {n: p.detach().clone() for n, p in reasoning.named_parameters()}
    information = {
        n: (g * own[n]).square().mean(0) for n, g in gradients(reasoning, pairs, mean=True).items()
    }
    merged = copy.deepcopy(own)
    for model, pairs in domains:
        for name, rows in gradients(model, pairs, mean=True).items():
            weight = model.state_dict()[name]
            harm = 3.0 * information[name] * (own[name] - weight) ** 2
            votes = torch.where(rows * weight + harm <= 0, 1, -1).sum(0)
            merged[name] += (votes > 0) * (weight - base[name])
    return merged


def regmean_pp(base, experts):
    """Whole models with merged blocks before the expert's own one, in float64 where it is solved."""
    states = [model.state_dict() for model, _ in experts]
    merged = {
        n: weight + sum(s[n] - weight for s in states) / len(states) for n, weight in base.items()
    }
    for number in range(3):
        block = f"model.layers.{number}."
        products = []
        for model, pairs in experts:
            mixed = copy.deepcopy(model)
            mixed.load_state_dict(
                {n: w if n.startswith(block) else merged[n] for n, w in model.state_dict().items()}
            )
            inputs = {}

            def note(_, args, __, name, inputs=inputs):
                inputs.setdefault(name, []).append(args[0][0])

            for name, module in mixed.named_modules():
                if isinstance(module, torch.nn.Linear) and name.startswith(block):
                    module.register_forward_hook(functools.partial(note, name=name))
            with torch.no_grad():
                for whole, _ in pairs:
                    mixed(whole)
            stacked = {n: torch.cat(rows).double() for n, rows in inputs.items()}
            products.append({n: x.T @ x / len(x) for n, x in stacked.items()})
        for module in products[0]:
            name = f"{module}.weight"
            grams = [0.8 * p[module] + 0.2 * p[module].diagonal().diag() for p in products]
            taus = [(s[name] - base[name]).double() for s in states]
            weighted = sum(tau @ g for tau, g in zip(taus, grams, strict=True))
            merged[name] = base[name] + (weighted @ sum(grams).inverse()).float()
    return merged


def expert_merging(base, experts):
    """Three steps of Adam through whole models whose weights are functions of the coefficients."""
    states = [model.state_dict() for model, _ in experts]
    layers = {n: n.split(".")[2] if ".layers." in n else n for n in base}
    rows = list(dict.fromkeys(layers.values()))
    coefficients = torch.full((len(rows), len(states)), 1 / len(states), requires_grad=True)

    def weights():
        return {
            n: weight
            + sum(
                c * (s[n] - weight)
                for c, s in zip(coefficients[rows.index(layers[n])], states, strict=True)
            )
            for n, weight in base.items()
        }

    def read(model, whole, start, own=None):
        arguments = (whole,), {"output_hidden_states": True}
        output = model(*arguments[0], **arguments[1])
        if own is not None:
            output = torch.func.functional_call(model, own, *arguments)
        return output.logits[0, start - 1 : -1].log_softmax(-1), output.hidden_states[2]

    optimizer = torch.optim.Adam([coefficients], lr=0.005)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.005 * (1 - step / 3)
        losses, own = [], weights()
        for model, pairs in experts:
            whole, start = pairs[step]
            with torch.no_grad():
                wanted, states_wanted = read(model, whole, start)
            logs, hidden = read(model, whole, start, own)
            divergence = (wanted.exp() * (wanted - logs)).sum() / len(logs)
            distance = (hidden - states_wanted).square().sum() / states_wanted.square().sum()
            losses.append(divergence + 2.0 * distance)
        apart = (coefficients - 1 / len(states)).square().mean()
        optimizer.zero_grad()
        (torch.stack(losses).mean() + 0.3 * apart).backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in weights().items()}


ORACLES = {
    "expert_merging": (
        expert_merging,
        {"steps": 3, "rate": 0.005, "hidden": 2.0, "penalty": 0.3},
    ),
    "fisher": (fisher, {}),
    "rcp": (rcp, {"penalty": 3.0}),
    "regmean_pp": (regmean_pp, {"off_diagonal": 0.8}),
}


@every_method
def test_a_method_gives_what_its_formula_gives(method, small, asked, merged, read):
    oracle, parameters = ORACLES[method]
    config = asked(small, method, **parameters)
    found = read(merged(config))
    experts = [answered(e["model"], e["parameters"]["prompts"]) for e in config["models"]]
    wanted = oracle(read(small.base), experts)
    assert found.keys() == wanted.keys()
    apart = 0
    for name, weight in wanted.items():
        # where a vote is a tie but for rounding, either side may win
        apart += int(((found[name] - weight).abs() > 2e-5).sum())
    assert apart <= (3 if method == "rcp" else 0)


@every_method
def test_one_expert_comes_back_as_it_is(method, small, asked, merged, read):
    path = small.experts["math"]
    found = read(merged(asked(small, method, models=[path])))
    for name, weight in read(path).items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0, msg=name)


@every_method
def test_the_order_of_the_experts_does_not_matter(method, small, asked, merged, read):
    config = asked(small, method)
    one = read(merged(config, name="one"))
    other = read(merged({**config, "models": config["models"][::-1]}, name="other"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("method", sorted(set(NAMES) - CHANGES_WHAT_ALL_AGREE_ON))
def test_experts_that_are_equal_give_that_expert(method, make, asked, merged, read):
    family = make(experts=("math",), dtype=torch.float32)
    path = family.experts["math"]
    twin = path.with_name("twin")
    twin.symlink_to(path)
    found = read(merged(asked(family, method, models=[path, twin])))
    for name, weight in read(path).items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0, msg=name)


@every_method
def test_experts_that_changed_nothing_give_the_base(method, make, asked, merged, read):
    family = make(experts=(), dtype=torch.float32)
    copies = [family.base.with_name(name) for name in ("one", "two")]
    for path in copies:
        path.symlink_to(family.base)
    found = read(merged(asked(family, method, models=copies)))
    for name, weight in read(family.base).items():
        assert torch.equal(found[name], weight), name


@every_method
def test_tied_weights_and_other_dtypes_merge_into_a_model_that_loads(method, make, asked, merged):
    import pico

    family = make(pico.llama_tied, experts=("math", "code"))
    out = merged({**asked(family, method), "out_dtype": "bfloat16"})
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


@every_method
def test_an_expert_without_prompts_is_refused(method, small, asked, refused):
    config = asked(small, method)
    del config["models"][1]["parameters"]["prompts"]
    message = refused(config)
    assert f"prompts: a file of prompts required by {method}, got none: add" in message
    assert str(small.experts["code"]) in message


@every_method
def test_a_file_of_prompts_that_is_missing_is_refused(method, small, asked, refused):
    config = asked(small, method)
    config["models"][1]["parameters"]["prompts"] = "nowhere.jsonl"
    assert "nowhere.jsonl: cannot be read" in refused(config)


@every_method
def test_experts_without_prompts_write_texts_themselves(method, small, asked, merged):
    config = asked(small, method, prompts=PROMPTS)
    for entry in config["models"]:
        del entry["parameters"]["prompts"]
    out = merged(config)
    for name, weight in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        assert weight.isfinite().all(), name


@every_method
def test_prompts_of_all_models_together_are_refused(method, small, asked, refused):
    message = refused(asked(small, method, prompts="x.jsonl"))
    assert "'prompts' belongs to one model's parameters: put it there" in message


@every_method
def test_two_files_of_one_model_are_refused(method, small, asked, refused):
    config = asked(small, method)
    config["models"][0]["parameters"]["prompts"] = ["a.jsonl", "b.jsonl"]
    assert "prompts: one value required, neither a gradient nor a filter" in refused(config)


@every_method
def test_an_unknown_parameter_is_refused(method, small, asked, refused):
    message = refused(asked(small, method, densty=0.1))
    assert "parameters: unknown parameter 'densty': use one of" in message


@every_method
def test_vocabularies_that_must_be_aligned_are_refused(method, small, asked, refused):
    config = {**asked(small, method), "tokenizer": {"source": "union"}}
    assert "one vocabulary required, as all models answer prompts" in refused(config)


@every_method
def test_a_merge_in_memory_is_refused(method):
    models = [{"w": torch.ones(3, 2) * i} for i in range(3)]
    parameters = {"reasoning": {1: True, 2: False}} if method == "rcp" else {}
    with pytest.raises(ConfigError, match=r"models on disk required, .* use mergekit-yaml"):
        merge_state_dicts(models, method, base=0, parameters=parameters)


@every_method
def test_a_plan_says_what_the_merge_needs(method, small, asked, tmp_path, read):
    config = write(asked(small, method), tmp_path / "plan.yml")
    planned = figures("plan", config)
    numbers = sum(weight.numel() for weight in read(small.base).values())
    kind = next(kind for kind in WITH_PROMPTS if kind.spec.name == method)
    assert list(planned["prompts"].values()) == [PROMPTS] * 3
    assert planned["dense"] == 4 * numbers
    assert planned["read"] == kind.times_read({}) * 4 * 4 * numbers
    assert planned["scratch"] == (kind.disk + 3 * kind.disk_each) * numbers
    assert planned["peak_memory"] > kind.memory * numbers
    text = call("plan", config).output
    assert "of disk in the temporary folder. One model is in memory" in text


def test_a_plan_refuses_what_the_merge_refuses(small, asked, tmp_path):
    config = asked(small, "fisher", densty=1)
    with pytest.raises(ConfigError, match="unknown parameter 'densty'"):
        prompted_plan.plan_prompted(MergeConfiguration.model_validate(config), MergeOptions())


@pytest.mark.parametrize("count", [0, 2])
def test_rcp_needs_one_reasoning_model(count, small, asked, refused):
    config = asked(small, "rcp")
    for number, entry in enumerate(config["models"]):
        entry["parameters"]["reasoning"] = number < count
    message = refused(config)
    assert f"exactly one model with `reasoning: true` required, got {count}" in message
