"""The command `evaluate` with everything it compares, on pico models and with mergekit itself."""

import json
import random
from dataclasses import replace

import click.testing
import pico
import pytest
import torch
from adapters import train
from safetensors.torch import load_file

from mergekit_mediator.cli.main import main
from mergekit_mediator.errors import InputError
from mergekit_mediator.evaluate import rivals, scorer
from mergekit_mediator.evaluate.contenders import located
from mergekit_mediator.evaluate.rivals import Rivals, known, truncated
from mergekit_mediator.evaluate.static_methods import STATIC
from mergekit_mediator.evaluate.trials import trials
from mergekit_mediator.models.loading import load_plain
from mergekit_mediator.models.prompts import render
from mergekit_mediator.store.evaluation import read_evaluation
from mergekit_mediator.store.manifest import EVALUATION, read_manifest


def call(*arguments):
    result = click.testing.CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def talkative():
    """A pico model that ends many of its answers after one word."""
    model = pico.llama(initializer_range=0.3)
    model.lm_head.weight.data[2] *= 2.5
    return model


@pytest.fixture(scope="module")
def family(make):
    return make(talkative, ("math", "code"))


@pytest.fixture(scope="module")
def out(family, tmp_path_factory):
    import yaml

    root = tmp_path_factory.mktemp("rivals")
    config = family.config(route="all", density=1.0) | {"out_dtype": "bfloat16"}
    (root / "config.yml").write_text(yaml.safe_dump(config))
    assert call("merge", root / "config.yml", root / "out", "--quiet").exit_code == 0
    return root / "out"


@pytest.fixture(scope="module")
def tasks(family, tmp_path_factory):
    """Options for prompts that each expert answers with one word, which is then the right answer."""
    root = tmp_path_factory.mktemp("tasks")
    options = []
    for name, folder in family.experts.items():
        model, tokenizer = load_plain(folder), pico.tokenizer()
        draw, lines = random.Random(0), []
        while len(lines) < 13:
            prompts = [" ".join(draw.choices(pico.WORDS, k=4)) for _ in range(64)]
            ids = torch.tensor([render(tokenizer, prompt) for prompt in prompts])
            with torch.no_grad():
                words = model(ids).logits[:, -1].argmax(-1)
                ends = model(torch.cat([ids, words[:, None]], 1)).logits[:, -1].argmax(-1)
            for prompt, word, end in zip(prompts, words.tolist(), ends.tolist(), strict=True):
                if end == 2 and word > 3:
                    lines.append({"prompt": prompt, "answer": tokenizer.decode([word])})
        path = root / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines[:13])))
        options += ["--task", f"{name}={path}"]
    return options


@pytest.fixture(scope="module")
def report(out, tasks, tmp_path_factory):
    """The folder that `evaluate` wrote with all rivals."""
    folder = tmp_path_factory.mktemp("report")
    options = ["--rivals", "all", "--rank", 2, "--rank", 4, "--each", "--limit", 8, "--tune", 5]
    options += ["--plot", folder / "all.svg"]
    result = call("evaluate", out, *tasks, *options, "--out", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == (folder / "evaluation.md").read_text().strip()
    return folder


def test_every_system_is_scored_and_the_experts_are_100(report):
    systems = json.loads((report / "evaluation.json").read_text())["systems"]
    static = [*STATIC, "best_static"]
    low_rank = ["extract_lora 2", "extract_lora 4", "twin_merging 2", "twin_merging 4"]
    ours = ["mediator_dense", "mediator_oracle", "mediator"]
    each = ["base", "experts", "expert math", "expert code"]
    assert list(systems) == [*each, *static, *low_rank, "best_expert_by_router", *ours]
    # density 1.0, exact: each task's own expert comes back bit for bit
    for name in ("experts", "mediator_oracle"):
        assert systems[name]["normalized_mean"] == systems[name]["normalized_worst"] == 100
    assert systems["mediator_oracle"]["tasks"] == systems["experts"]["tasks"]
    assert systems["average"]["tasks"] == systems["mediator_dense"]["tasks"]
    assert systems["base"]["normalized_mean"] < 100
    assert systems["base"]["recovered_mean"] == 0


def test_sizes_times_and_routing_stand_beside_the_scores(report):
    systems = json.loads((report / "evaluation.json").read_text())["systems"]
    assert systems["experts"]["total_bytes_over_base"] == 2
    assert systems["ties"]["total_bytes_over_base"] == pytest.approx(1, abs=0.05)
    assert systems["extract_lora 2"]["total_bytes_over_base"] > 1
    sizes = [systems[f"extract_lora {rank}"]["total_bytes_over_base"] for rank in (2, 4)]
    assert sizes[0] < sizes[1]
    for name in ("ties", "twin_merging 4", "mediator"):
        assert systems[name]["merge_cpu_seconds"] > 0
    assert systems["mediator"]["resident_bytes_over_base"] > 1
    right = systems["mediator"]["routing_accuracy"]
    assert right == systems["best_expert_by_router"]["routing_accuracy"]
    assert 0 <= right <= 1
    coefficients = systems["task_arithmetic"]["coefficients"]
    assert coefficients.startswith("task_arithmetic weight 1.0 times 0.")
    tried = {name: systems[name]["tried"] for name in ("task_arithmetic", "ties", "pcb")}
    assert tried == {"task_arithmetic": 4, "ties": 4, "pcb": 2}


def test_best_static_is_the_best_on_the_tuning_prompts(report):
    systems = json.loads((report / "evaluation.json").read_text())["systems"]
    best = max((systems[name] for name in STATIC), key=lambda row: row["tuning_mean"])
    assert systems["best_static"] == best


def test_a_picture_and_a_table_are_written(report):
    assert (report / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = (report / "evaluation.md").read_text()
    assert "| exact match, % | math | code | mean of expert | worst of expert |" in table
    assert "| nats per answer token | math | code |" in table


def test_the_artifact_keeps_the_results_of_its_last_evaluation(report, out):
    figures = json.loads((report / "evaluation.json").read_text())
    record = read_evaluation(out, read_manifest(out))
    assert list(record.systems) == list(figures["systems"])
    assert record.sources == {"math": "math.jsonl", "code": "code.jsonl"}
    assert sum(n for n, _, _ in record.reliability) == 16
    hits = sum(n * accuracy for n, _, accuracy in record.reliability) / 16
    assert hits == pytest.approx(record.systems["mediator"].routing_accuracy)


def test_the_picture_shows_quality_confusion_and_reliability(report):
    texts = (report / "all.svg").read_text()
    for text in ("bytes beside one model", "routed to, %", "confidence"):
        assert f">{text}</text>" in texts


def test_nothing_is_merged_or_scored_twice(report, out, tasks, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("run again")

    monkeypatch.setattr(scorer, "score_answers", refuse)
    monkeypatch.setattr("mergekit.merge.run_merge", refuse)
    options = ["--rivals", "ties,average,regmean_pp", "--limit", 8, "--tune", 5, "--out", report]
    options += ["--no-record"]
    record = (out / EVALUATION).read_bytes()
    before = json.loads((report / "evaluation.json").read_text())["systems"]["ties"]
    assert call("evaluate", out, *tasks, *options).exit_code == 0
    assert json.loads((report / "evaluation.json").read_text())["systems"]["ties"] == before
    assert (out / EVALUATION).read_bytes() == record


def test_an_artifact_alone_is_compared_with_its_own_experts(out, tasks):
    result = call("evaluate", out, *tasks, "--limit", 2, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert list(figures["systems"]) == ["mediator_dense", "mediator_oracle", "mediator"]
    assert figures["systems"]["mediator_oracle"]["normalized_mean"] == 100
    assert sum(figures["routing"]["math"]["chosen"].values()) == 2


def test_every_model_is_scored_in_the_dtype_that_is_asked_for(out, tasks, monkeypatch):
    seen, stock = set(), scorer.score_answers

    def watched(model, *arguments):
        seen.add(next(model.parameters()).dtype)
        return stock(model, *arguments)

    monkeypatch.setattr(scorer, "score_answers", watched)
    options = ["--rivals", "extract_lora,average", "--limit", 4, "--tune", 4, "--dtype", "float16"]
    result = call("evaluate", out, *tasks, *options)
    assert result.exit_code == 0, result.output
    assert seen == {torch.float16}


def test_scores_are_not_lost_where_the_merge_cannot_be_timed(family, merged, tasks, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(8)))
    config = family.config(bits=2, route="all")
    config["models"][0]["parameters"]["prompts"] = str(prompts)
    tuned = merged(config)
    prompts.unlink()
    options = ["--rivals", "average", "--limit", 4, "--tune", 4, "--json"]
    result = call("evaluate", tuned, *tasks, *options)
    assert result.exit_code == 0, result.output
    assert (
        "warning: the time of the merge is not measured: rival mediator: mergekit: model"
        in result.stderr
    )
    assert "prompts.jsonl" in result.stderr
    systems = json.loads(result.stdout)["systems"]
    assert "merge_cpu_seconds" in systems["average"]
    assert "merge_cpu_seconds" not in systems["mediator"]


def test_factors_of_one_merge_give_the_merges_with_these_coefficients(family, tmp_path):
    made = Rivals(str(family.base), {n: str(p) for n, p in family.experts.items()}, tmp_path)
    name, tried = "task_arithmetic", STATIC["task_arithmetic"]
    scaled = list(trials(made, name, tried))
    assert [trial.label for trial in scaled] == [
        f"task_arithmetic weight 1.0 times {factor}" for factor in tried.factors
    ]
    alone = tuple({"weight": factor, "normalize": False} for factor in tried.factors)
    single = trials(made, name, replace(tried, parameters=alone, factors=(1.0,)))
    for one, other in zip(scaled, single, strict=True):
        got, wanted = (load_file(t.folder / "model.safetensors") for t in (one, other))
        assert got.keys() == wanted.keys()
        for weight in got:
            assert got[weight].dtype == torch.bfloat16
            torch.testing.assert_close(got[weight], wanted[weight], atol=1e-6, rtol=2**-7)


def test_a_method_with_prompts_reads_those_that_coefficients_are_chosen_on(family, tmp_path):
    made = Rivals(str(family.base), {n: str(p) for n, p in family.experts.items()}, tmp_path)
    prompts = {n: [f"w{i} w{i + 1}" for i in range(5)] for n in family.experts}
    other = {n: [*of[1:], ({"role": "user", "content": "w9"},)] for n, of in prompts.items()}
    first, again, changed = (
        [t.folder for t in trials(made, "regmean_pp", STATIC["regmean_pp"], p)]
        for p in (prompts, prompts, other)
    )
    assert first == again
    assert not set(first) & set(changed)  # a merge with other prompts is not used again
    assert all((folder / "model.safetensors").exists() for folder in (*first, *changed))


def test_a_rival_without_prompts_of_every_expert_is_left_out_with_a_warning(out, tasks):
    options = ["--rivals", "average,regmean_pp", "--limit", 4, "--json"]
    result = call("evaluate", out, *tasks[:2], *options, "--tune", 5)
    assert result.exit_code == 0, result.output
    assert (
        "warning: rival regmean_pp is left out: 5 examples of every expert's task required to tune on, got 0 of code"
        in result.stderr
    )
    systems = json.loads(result.stdout)["systems"]
    assert "average" in systems
    assert "regmean_pp" not in systems


def test_an_unknown_rival_is_named_with_the_known_ones(out, tasks):
    result = call("evaluate", out, *tasks, "--rivals", "ties,slerp")
    assert result.exit_code == 1
    expected = f"unknown rival 'slerp': choose from {', '.join(rivals.KNOWN)}, or all"
    assert expected in result.output


def test_all_is_every_rival():
    assert known(["all"]) == rivals.KNOWN


def test_experts_that_are_gone_are_named(out, tasks, tmp_path):
    gone = tmp_path / "gone"
    result = call("evaluate", out, *tasks, "--experts", "--expert", f"math={gone}")
    assert result.exit_code == 1
    assert f"expert math: {gone} is not on this machine" in result.output


def test_a_place_is_a_directory_or_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert located("the base", "model") == str(tmp_path / "model")
    assert located("the base", "org/model") == "org/model"
    assert located("expert", "model+org/adapter") == f"{tmp_path}/model+org/adapter"
    with pytest.raises(InputError, match=r"the base: \./other is not on this machine"):
        located("the base", "./other")


def test_too_few_examples_to_tune_on_are_refused(out, tasks):
    result = call("evaluate", out, *tasks, "--rivals", "ties", "--limit", 13)
    assert result.exit_code == 1
    assert "all 13 examples are reported (--limit 13), none is left" in result.output


def test_a_truncated_adapter_is_the_extraction_at_that_rank(family, tmp_path):
    made = Rivals(str(family.base), {n: str(p) for n, p in family.experts.items()}, tmp_path)
    wide, _ = made.adapter("math", made.base, 4, "wide")
    narrow, _ = made.adapter("math", made.base, 2, "narrow")
    cut = truncated(wide, 2)
    expected = load_file(narrow / "adapter_model.safetensors")
    got = load_file(cut / "adapter_model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_a_merge_that_mergekit_refuses_is_an_error_of_one_line(family, tmp_path):
    made = Rivals(str(family.base), {n: str(p) for n, p in family.experts.items()}, tmp_path)
    with pytest.raises(InputError, match="rival other: mergekit: "):
        made.merged({"merge_method": "ties", "models": [{"model": made.base}]}, "other")


def test_adapters_are_merged_into_their_base_to_be_compared(family, merged, tasks, tmp_path):
    for seed, name in enumerate(family.experts):
        train(family.base, tmp_path / name, seed)
    models = [{"model": f"{family.base}+{tmp_path / name}"} for name in family.experts]
    out = merged(family.config(models=models, route="all"))
    options = ["--rivals", "average,extract_lora,best_expert", "--rank", 4, "--limit", 4]
    result = call("evaluate", out, *tasks, *options, "--tune", 4, "--json")
    assert result.exit_code == 0, result.output
    systems = json.loads(result.stdout)["systems"]
    for task, score in systems["experts"]["tasks"].items():
        expert = systems["mediator_oracle"]["tasks"][task]
        likelihood = score["answer_log_likelihood"]
        assert expert["answer_log_likelihood"] == pytest.approx(likelihood, abs=0.05)
        assert likelihood != systems["base"]["tasks"][task]["answer_log_likelihood"]


def test_spaces_and_a_last_comma_between_rivals_mean_nothing():
    assert known(["ties", " della", ""]) == ("ties", "della")


def test_a_place_of_an_expert_that_is_not_there_is_refused(out, tasks):
    result = call("evaluate", out, *tasks, "--experts", "--expert", "law=org/law")
    assert result.exit_code == 2
    assert "unknown expert 'law': this artifact has math, code" in result.output


def test_two_tasks_of_one_name_are_refused(out, tasks):
    result = call("evaluate", out, *tasks, *tasks[:2])
    assert result.exit_code == 1
    assert "task 'math' is named twice" in result.output


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_scored(
    out, tasks, tmp_path, monkeypatch
):
    monkeypatch.setattr(scorer, "score_answers", None)
    (tmp_path / "file").write_text("x")
    result = call("evaluate", out, *tasks, "--out", tmp_path / "file" / "report")
    assert result.exit_code == 1
    assert "report: cannot be created: Not a directory" in result.output


def test_damaged_scores_say_what_to_remove(out, tasks, tmp_path):
    (tmp_path / "scores.json").write_text("{")
    result = call("evaluate", out, *tasks, "--out", tmp_path)
    assert result.exit_code == 1
    assert "scores.json: the file holds no scores" in result.output


def test_where_no_expert_answers_anything_the_table_is_written_without_a_picture(out, tmp_path):
    task = tmp_path / "math.jsonl"
    task.write_text(json.dumps({"prompt": "w1", "answer": "w1 w1 w1 w1 w1 w1 w1"}))
    folder = tmp_path / "report"
    result = call("evaluate", out, "--task", f"math={task}", "--out", folder)
    assert result.exit_code == 0, result.output
    assert "warning: " in result.stderr
    assert "there is nothing to draw" in result.stderr
    assert (folder / "evaluation.md").exists()
    assert not (folder / "evaluation.png").exists()
