"""The example of serving runs as it stands, on a pico artifact."""

import os
import subprocess
import sys

import served_pico
import vllm_server


def test_the_example_serves_an_artifact_and_asks_it(artifact, tmp_path):
    prompts = [served_pico.prompts(name, 1, seed=8)[0] for name in ("math", "chat")]
    command = [sys.executable, "examples/serve_on_vllm.py", str(artifact), *prompts]
    command += ["--vllm", str(vllm_server.PYTHON.with_name("vllm")), "--max-tokens", "4"]
    command += ["--port", str(vllm_server.free_port()), "--max-model-len", "128"]
    variables = {"MEDIATOR_CACHE": str(tmp_path), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    result = subprocess.run(
        command,
        cwd=vllm_server.ROOT,
        env={**os.environ, **variables, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert any(line.startswith("models:") and "dense, auto" in line for line in lines)
    decisions = [line for line in lines if line.startswith("decision:")]
    assert '"math"' in decisions[0]
    assert '"chat"' in decisions[1]
