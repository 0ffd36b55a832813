"""A real vLLM server in a process of its own; `make .venv-vllm/ready` installs it."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm/bin/python"
_MAIN = "from vllm.entrypoints.cli.main import main; main()"
_SECONDS_TO_START = 400


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(artifact, port, log, *options, before="", **environment):
    """Start `vllm serve`; gives the process, which leads a group of its own.

    Args:
        artifact: to serve.
        port: to listen on.
        log: the file for all output.
        options: of `vllm serve`.
        before: Python code that runs first.
        environment: variables.
    """
    command = [str(PYTHON), "-c", before + _MAIN, "serve", str(artifact), "--port", str(port)]
    variables = {
        "VLLM_PLUGINS": "mediator",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*command, "--host", "127.0.0.1", *options],
        env={**os.environ, **variables, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(process):
    """End a server and the processes that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def served(artifact, folder, *options, **environment):
    """A server that answers; gives the address of its OpenAI routes."""
    port = free_port()
    path = folder / "vllm.log"
    with path.open("wb") as log:
        process = start(artifact, port, log, *options, **environment)
        try:
            end = time.monotonic() + _SECONDS_TO_START
            while not is_up(port):
                assert process.poll() is None, path.read_text()[-3000:]
                assert time.monotonic() < end, path.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stop(process)


def is_up(port):
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
