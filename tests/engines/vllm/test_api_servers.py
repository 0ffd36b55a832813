"""Several API servers of one vLLM answer alike: adapters have the same numbers everywhere."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import served_pico
import vllm_server

OPTIONS = "--dtype float32 --enable-lora --max-loras 6 --max-lora-rank 16 --max-model-len 128"
NAMES = ("dense", "math", "code", "math=0.5,code=0.5", "chat=0.25,code=0.75", "auto")


def test_every_api_server_gives_the_same_answers(artifact, tmp_path):
    options = [*OPTIONS.split(), "--enforce-eager", "--api-server-count", "2"]
    prompts = served_pico.prompts("code", 3, seed=6)
    asked = [(name, prompt) for name in NAMES for prompt in prompts]
    with vllm_server.served(
        artifact, tmp_path, *options, MEDIATOR_CACHE=str(tmp_path / "cache"), MEDIATOR_BLENDS="1"
    ) as address:

        def ask(pair):
            """Over a connection of its own, which any of the servers may take."""
            body = {"model": pair[0], "prompt": pair[1], "max_tokens": 6, "temperature": 0}
            for _ in range(100):
                response = httpx.post(f"{address}/completions", json=body, timeout=60)
                if response.status_code != 429:  # the place of a blend is taken
                    break
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"]

        with ThreadPoolExecutor(4) as threads:
            rounds = [list(threads.map(ask, asked)) for _ in range(6)]
    assert all(answers == rounds[0] for answers in rounds)
    answers = dict(zip(asked, rounds[0], strict=True))
    for prompt in prompts:
        assert answers["auto", prompt] == answers["code", prompt] != answers["dense", prompt]
        assert len({answers[name, prompt] for name in NAMES}) >= 3
