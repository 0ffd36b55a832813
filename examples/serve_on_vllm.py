"""Serve an artifact with vLLM on this machine, and ask it as a client of OpenAI does.

python examples/serve_on_vllm.py demo/mediator --vllm .venv-vllm/bin/vllm
python examples/serve_on_vllm.py OUT "What is 12 + 30?" "Reverse: a b c"
"""

import argparse
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an artifact with vLLM and ask it.")
    parser.add_argument("artifact", help="a directory, or a repository on the Hub")
    parser.add_argument(
        "prompts", nargs="*", help="if none are given, one of each skill of the demo"
    )
    parser.add_argument("--vllm", default="vllm", help="the command of vLLM")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument(
        "--max-model-len", type=int, default=1024, help="prompt and answer, in tokens"
    )
    arguments = parser.parse_args()

    prompts = arguments.prompts or prompts_of_the_demo()
    with served(arguments) as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        print("models:  ", ", ".join(model.id for model in client.models.list()), "\n")
        for prompt in prompts:
            answer = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=arguments.max_tokens,
                temperature=0,
            )
            decision = (answer.model_extra or {})["mediator"]
            print(f"prompt:   {prompt}")
            print(f"decision: {json.dumps(decision)}")
            print(f"answer:   {answer.choices[0].message.content}\n", flush=True)


def prompts_of_the_demo() -> list[str]:
    """One prompt of each skill that `mergekit-mediator demo` merges."""
    from mergekit_mediator.cli.demo import load_skills

    return [str(task.examples[0].prompt) for task in load_skills(1).values()]


@contextmanager
def served(arguments: argparse.Namespace) -> Iterator[str]:
    """A vLLM server of an artifact; gives the address of its OpenAI routes."""
    port = arguments.port
    command = [arguments.vllm, "serve", arguments.artifact, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", str(arguments.max_model_len)]
    command += ["--enable-lora", "--max-loras", "6", "--max-lora-rank", "64"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_PLUGINS": "mediator"}
    server = subprocess.Popen(command, env=environment)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None:
                raise SystemExit(f"vLLM ended with status {server.returncode}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def answers(url: str) -> bool:
    """Whether a server is there and well."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
