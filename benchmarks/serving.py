"""Experts on vLLM: the same answers, the cost of routing, and what adapters of a rank keep.

    python benchmarks/serving.py BASE --experts DIR --tasks A,B,C,D --work DIR

BASE and the experts (adapters or full models) are as train_experts.py leaves them. vLLM comes from
`make .venv-vllm/ready`, and answers in float32. The plain model, a named adapter and `auto` take
turns within every round, so that other work on the machine slows all of them. On processors the plain model
is an adapter of zeros, as the plugin serves it there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import exported_ranks
import openai
import record
import torch
import vllm_server
from artifacts import CALIBRATION_PROMPTS, artifact, prompt_files, source, tasks_of
from train_experts import REPORT_SEED

from mergekit_mediator import MediatorModel
from mergekit_mediator.engines.deciders import EmbeddingDecider
from mergekit_mediator.evaluate.rivals import Rivals
from mergekit_mediator.models.prompts import render
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.store.manifest import ROUTER

ANSWER_TOKENS, LOAD_TOKENS, AT_ONCE = 24, 16, 32
BLENDS = ({0: 0.5, 1: 0.5}, {1: 0.25, 2: 0.375, 3: 0.375})  # by place of the expert


def quantile(values: list[float], part: float) -> float:
    """The value that this part of all is at most."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


class Client:
    """Asks a server with token ids, which no chat template changes."""

    def __init__(self, address: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=20)

    async def ask(self, model: str, ids: list[int], tokens: int, to_the_end: bool = False) -> Any:
        more = {"ignore_eos": True} if to_the_end else None
        return await self._client.completions.create(
            model=model, prompt=ids, max_tokens=tokens, temperature=0, extra_body=more
        )

    async def all(self, asked: list[tuple[str, list[int]]], tokens: int, end: bool) -> list[Any]:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(model: str, ids: list[int]) -> Any:
            async with limit:
                return await self.ask(model, ids, tokens, end)

        return await asyncio.gather(*(one(*pair) for pair in asked))


def expected(model: MediatorModel, mixture: Any, rows: list[list[int]]) -> list[str]:
    """The greedy answers of the routed model under a mixture."""
    texts = []
    for start in range(0, len(rows), 10):
        ids, mask = model.pad(rows[start : start + 10])
        options: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        out = model.generate(ids, mask, mixture=mixture, **options)
        tokens = out[:, ids.shape[1] :]
        texts += model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


async def same_answers(
    client: Client, model: MediatorModel, prompts: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """How many answers of the server are those of the routed model: experts on their own prompts, and blends."""
    asked: list[tuple[str, Any, list[int]]] = []
    for name, rows in prompts.items():
        asked += [(name, name, row) for row in rows]
    several = [row for rows in prompts.values() for row in rows[: len(rows) // 8]]
    for blend in BLENDS:
        weights = {model.experts[place]: p for place, p in blend.items()}
        name = ",".join(f"{n}={p}" for n, p in weights.items())
        asked += [(name, weights, row) for row in several]
    answers = await client.all([(name, row) for name, _, row in asked], ANSWER_TOKENS, False)
    served = [answer.choices[0].text.strip() for answer in answers]
    same = []
    for name in dict.fromkeys(name for name, _, _ in asked):
        places = [i for i, entry in enumerate(asked) if entry[0] == name]
        texts = expected(model, asked[places[0]][1], [asked[i][2] for i in places])
        same += [served[i] == text.strip() for i, text in zip(places, texts, strict=True)]
    return {"same_answers": sum(same) / len(same), "answers": len(same)}


async def right_experts(client: Client, prompts: dict[str, list[list[int]]]) -> float:
    """The part of prompts that `auto` sends to their own expert."""
    asked = [("auto", row) for rows in prompts.values() for row in rows]
    answers = await client.all(asked, 1, False)
    names = [name for name, rows in prompts.items() for _ in rows]
    chosen = [
        max(a.model_extra["mediator"]["mixture"].items(), key=lambda x: x[1], default=("", 0))
        for a in answers
    ]
    return sum(name == choice[0] for name, choice in zip(names, chosen, strict=True)) / len(names)


async def throughput(
    client: Client, prompts: dict[str, list[list[int]]], rounds: int, requests: int
) -> dict[str, list[float]]:
    """Tokens a second of the plain model, named adapters and `auto`, with 32 requests at once, by round."""
    per_expert = requests // len(prompts)
    rows = [(n, row) for n, some in prompts.items() for row in some[:per_expert]]
    modes = {
        "plain": [("dense", row) for _, row in rows],
        "named": rows,
        "auto": [("auto", row) for _, row in rows],
    }
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    for turn in range(rounds + 1):
        order = list(modes) if turn % 2 else list(reversed(modes))
        for mode in order:
            began = time.perf_counter()
            await client.all(modes[mode], LOAD_TOKENS, True)
            rate = len(rows) * LOAD_TOKENS / (time.perf_counter() - began)
            if turn:  # the first one warms up
                rates[mode].append(rate)
    return rates


async def latency(
    client: Client, prompts: dict[str, list[list[int]]], pairs: int
) -> dict[str, Any]:
    """Milliseconds of single requests of one token, named and `auto` in turn."""
    rows = [(n, row) for n, some in prompts.items() for row in some]
    times: dict[str, list[float]] = {"named": [], "auto": []}
    for i in range(pairs):
        name, row = rows[i % len(rows)]
        for mode in ("named", "auto") if i % 2 else ("auto", "named"):
            began = time.perf_counter()
            await client.ask(name if mode == "named" else "auto", row, 1)
            times[mode].append(1000 * (time.perf_counter() - began))
    return {
        mode: {"median_ms": statistics.median(some), "p99_ms": quantile(some, 0.99)}
        for mode, some in times.items()
    }


def decision_ms(decider: EmbeddingDecider, prompts: dict[str, list[list[int]]]) -> dict[str, float]:
    """Milliseconds of a decision within the server's process; `cpu` is the time of its thread alone."""
    rows = [tuple(row) for some in prompts.values() for row in some]
    wall, cpu = [], []
    for row in [*rows[:20], *rows, *rows]:
        began, worked = time.perf_counter(), time.thread_time()
        decider._decide([row], "prompt")
        wall.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.thread_time() - worked))
    result: dict[str, float] = {}
    for name, some in (("wall", wall[20:]), ("cpu", cpu[20:])):
        result |= {
            f"{name}_median_ms": statistics.median(some),
            f"{name}_p99_ms": quantile(some, 0.99),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", required=True, help="folders of --experts, separated by commas")
    parser.add_argument("--family", default="adapters")
    parser.add_argument("--bits", type=float, help="a parameter of each expert; else 10%% of them")
    parser.add_argument("--work", type=Path, default=Path("serving"))
    parser.add_argument("--prompts", type=int, default=40, help="an expert, that are reported on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64, help="of a round, in each mode")
    parser.add_argument("--pairs", type=int, default=120, help="of single requests")
    parser.add_argument("--rank", type=int, default=16, help="of the server")
    parser.add_argument("--extract-ranks", default="8,16", help="of mergekit-extract-lora")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    folders = {name: arguments.experts / name for name in arguments.tasks.split(",")}
    sources = {name: source(arguments.base, folder) for name, folder in folders.items()}
    made = Rivals(str(arguments.base.resolve()), sources, arguments.work / "merges")
    tasks = tasks_of(folders, arguments.prompts, REPORT_SEED)
    storage = exported_ranks.storage(arguments.bits)
    parameters = {"route": "all", "reference": "base", **storage}
    model, _ = artifact(made, f"{arguments.family}-base", parameters)
    prompts = {
        name: [render(model.tokenizer, e.prompt) for e in task.examples]
        for name, task in tasks.items()
    }
    data = prompt_files(folders, CALIBRATION_PROMPTS, arguments.work, tasks)
    calibrate_artifact(model.root, model.model, model.tokenizer, data, kind="embedding")
    model = MediatorModel.from_pretrained(model.root, dtype="float32")
    decider = EmbeddingDecider(model.root, model.manifest, model.root / ROUTER)

    options = ["--dtype", "float32", "--enable-lora", "--max-loras", "8", "--max-model-len", "1024"]
    options += ["--max-lora-rank", str(arguments.rank), "--no-enable-prefix-caching"]
    environment = {"MEDIATOR_CACHE": str(arguments.work / "cache")}
    environment["OMP_NUM_THREADS"] = str(arguments.threads)
    with vllm_server.served(model.root, arguments.work, *options, **environment) as address:

        async def measure() -> dict[str, Any]:
            client = Client(address)
            rates = await throughput(client, prompts, arguments.rounds, arguments.requests)
            print(json.dumps(rates), flush=True)
            return {
                **await same_answers(client, model, prompts),
                "auto_right_experts": await right_experts(client, prompts),
                "tokens_per_second": rates,
                "latency": await latency(client, prompts, arguments.pairs),
            }

        figures = asyncio.run(measure())
    rates, times = figures["tokens_per_second"], figures["latency"]
    decision = decision_ms(decider, prompts)
    exported = exported_ranks.rows(
        made,
        exported_ranks.answers_of(model.tokenizer, tasks),
        dict.fromkeys(exported_ranks.NORMS, exported_ranks.RANKS),
        exported_ranks.numbers(arguments.extract_ranks),
        arguments.family,
        storage,
        arguments.work / "exported",
    )
    result = {
        "auto_throughput_over_named": statistics.median(
            a / n for a, n in zip(rates["auto"], rates["named"], strict=True)
        ),
        "named_throughput_over_plain": statistics.median(
            n / p for n, p in zip(rates["named"], rates["plain"], strict=True)
        ),
        "auto_added_median_ms": times["auto"]["median_ms"] - times["named"]["median_ms"],
        "auto_added_p99_ms": decision["cpu_p99_ms"],
        "auto_added_p99_ms_of": "the router's decision, from token ids, one request, time of its thread",
        "decision": decision,
        "router": decider.name,
        **figures,
        "rank": arguments.rank,
        "requests_at_once": AT_ONCE,
        "threads": arguments.threads,
        "vllm": "0.32.0",
        "exported": exported_ranks.with_other_families(list(exported)),
    }
    if record.exists("serving"):
        result["also"] = record.read("serving").get("also", {})
    print(record.write("serving", result, {"report": REPORT_SEED}))


if __name__ == "__main__":
    main()
