"""A vLLM server that cannot serve an artifact ends at its start: one line and exit status 1."""

import shutil

import pytest
import vllm_server

LORA = ("--enable-lora", "--max-loras", "6", "--max-lora-rank", "16")
OLD = "import vllm; vllm.__version__, vllm.__version_tuple__ = '0.31.0', (0, 31, 0);"


@pytest.fixture
def failed(artifact, tmp_path):
    """Starts a server that must end by itself; gives the one line that it says."""

    def run(*options, root=artifact, before="", **environment):
        environment = {"MEDIATOR_CACHE": str(tmp_path / "cache"), **environment}
        options = ("--dtype", "float32", "--max-model-len", "128", "--enforce-eager", *options)
        path = tmp_path / "vllm.log"
        with path.open("wb") as log:
            process = vllm_server.start(
                root, vllm_server.free_port(), log, *options, before=before, **environment
            )
            try:
                status = process.wait(240)
            finally:
                vllm_server.stop(process)
        text = path.read_text()
        assert status == 1, text[-3000:]
        lines = [line for line in text.splitlines() if "mergekit-mediator: " in line]
        assert len(lines) == 1, text[-3000:]
        assert "Traceback" not in text, text[-3000:]
        return lines[0]

    return run


def test_an_engine_without_adapters(failed):
    assert "allows no adapters: start vLLM with --enable-lora" in failed()


def test_a_rank_above_the_engine_s(failed):
    assert "start vLLM with --max-lora-rank 32" in failed(*LORA, MEDIATOR_RANK="32")


def test_an_artifact_that_does_not_verify(failed, artifact, tmp_path):
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    path = damaged / "mediator/experts/math.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "math.safetensors" in failed(*LORA, root=damaged)


def test_another_version_of_vllm(failed):
    line = failed(*LORA, before=OLD)
    assert "vLLM 0.32 required, got 0.31.0: install vllm==0.32.*" in line


def test_a_cache_that_cannot_be_written(failed, tmp_path):
    (tmp_path / "file").write_text("")
    assert "the adapter cannot be written" in failed(*LORA, MEDIATOR_CACHE=str(tmp_path / "file"))


def test_a_setting_that_does_not_exist(failed):
    assert "MEDIATOR_POLCY" in failed(*LORA, MEDIATOR_POLCY="soft")
