"""Two real vLLM servers behind the gateway: one is killed and started again, and no request is lost."""

import asyncio
import os
import random
import signal
import threading
import time

import openai
import pytest
import served_pico
import vllm_server
from local_servers import running

from mergekit_mediator.engines import gateway
from mergekit_mediator.engines.deciders import choose_decider
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.store.manifest import read_manifest

OPTIONS = "--dtype float32 --enable-lora --max-loras 6 --max-lora-rank 16 --max-model-len 128"
REQUESTS = 500


class Engine:
    """A vLLM server that can be killed and started again on its port."""

    def __init__(self, artifact, folder, name):
        self.artifact, self.cache = artifact, folder / "cache"
        self.port, self.log = vllm_server.free_port(), (folder / f"{name}.log").open("wb")
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        options = [*OPTIONS.split(), "--enforce-eager"]
        settings = {"MEDIATOR_CACHE": str(self.cache)}
        self.process = vllm_server.start(self.artifact, self.port, self.log, *options, **settings)

    def wait(self):
        end = time.monotonic() + 300
        while not vllm_server.is_up(self.port):
            assert self.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.5)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def engines(artifact, tmp_path):
    both = []
    try:
        for name in "ab":
            both.append(Engine(artifact, tmp_path, name))
            both[-1].wait()
        yield both
    finally:
        for engine in both:
            vllm_server.stop(engine.process)


def test_no_request_is_lost_and_none_goes_to_a_wrong_expert(artifact, engines, monkeypatch):
    monkeypatch.setattr(gateway, "_SECONDS_BETWEEN_QUESTIONS", 0.5)
    manifest = read_manifest(artifact)
    decider = choose_decider(artifact, manifest, "embedding")
    urls = tuple(engine.url for engine in engines)
    app = gateway.gateway_app(manifest.expert_names, decider, ServiceSettings(), urls)
    per_expert = -(-REQUESTS // 3)
    asked = [(n, p) for n in served_pico.WORDS for p in served_pico.prompts(n, per_expert, seed=9)]
    random.Random(0).shuffle(asked)
    asked = asked[:REQUESTS]
    done = threading.Event()

    def fault():
        done.wait()
        engines[0].kill()
        engines[0].start()

    thread = threading.Thread(target=fault)
    thread.start()
    with running(app) as address:
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        async def run():
            limit, count = asyncio.Semaphore(8), 0

            async def one(prompt):
                nonlocal count
                async with limit:
                    answer = await client.completions.create(
                        model="auto", prompt=prompt, max_tokens=4, temperature=0
                    )
                    count += 1
                    if count == REQUESTS // 3:
                        done.set()
                    return answer

            return await asyncio.gather(*(one(prompt) for _, prompt in asked))

        answers = asyncio.run(run())
        thread.join()
        engines[0].wait()
        mixtures = [answer.model_extra["mediator"]["mixture"] for answer in answers]
        chosen = [max(mixture, key=mixture.get) for mixture in mixtures]
        assert len(answers) == REQUESTS
        assert chosen == [name for name, _ in asked]
        again = openai.OpenAI(base_url=f"{engines[0].url}/v1", api_key="none")
        own = again.completions.create(model="math", prompt="w1 w2", max_tokens=4, temperature=0)
        other = openai.OpenAI(base_url=f"{engines[1].url}/v1", api_key="none")
        same = other.completions.create(model="math", prompt="w1 w2", max_tokens=4, temperature=0)
        assert own.choices[0].text == same.choices[0].text
