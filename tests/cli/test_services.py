"""The commands that serve, as processes: they answer, and a signal ends them with status 0."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
import served_pico
from commands import call
from fake_upstream import FakeUpstream
from local_servers import running
from vllm_server import free_port


@contextmanager
def served(*arguments, **environment):
    """A command that serves; gives its address once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "mergekit_mediator.cli.main", *arguments, "--port", str(port)]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while not _ready(address):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def _ready(address):
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_classify_serves_the_router_of_an_artifact(artifact):
    (text,) = served_pico.prompts("chat", 1, seed=4)
    with served("classify", str(artifact)) as address:
        labels = httpx.post(f"{address}/classify", json={"inputs": text}).json()
    assert labels[0]["label"] == "chat"


def test_gateway_routes_to_engines(artifact):
    upstream = FakeUpstream("a")
    (text,) = served_pico.prompts("code", 1, seed=4)
    asked = {"model": "auto", "prompt": text}
    with (
        running(upstream.app) as url,
        served("gateway", str(artifact), "--upstream", url, MEDIATOR_SAY="body") as address,
    ):
        response = httpx.post(f"{address}/v1/completions", json=asked)
    assert response.json()["choices"][0]["text"] == "a:code"
    assert "mediator" in response.json()
    assert "x-mediator-mixture" not in response.headers


@pytest.mark.parametrize("command", [("classify",), ("gateway", "--upstream", "http://x")])
def test_what_cannot_be_served_is_one_line_and_status_1(command, tmp_path):
    result = call(command[0], tmp_path, *command[1:])
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert "manifest" in result.output


def test_a_wrong_setting_of_the_gateway_is_named(artifact, monkeypatch):
    monkeypatch.setenv("MEDIATOR_POLICY", "loud")
    result = call("gateway", artifact, "--upstream", "http://x")
    assert result.exit_code == 1
    assert "policy: input should be 'hard', 'soft' or 'auto'" in result.output
