"""A real vLLM with the resolver and the middleware in the plugin's place, and the plugin on a baked model."""

import subprocess

import openai
import pytest
import served_pico
import torch
import vllm_server
from commands import figures
from peft import PeftModel
from transformers import AutoModelForCausalLM

LORA = "--dtype float32 --enable-lora --max-loras 6 --max-lora-rank 64 --max-model-len 128"
MIDDLEWARE = "mergekit_mediator.engines.route_to_names.RouteToNames"
REGISTER = """
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
print(sorted(LoRAResolverRegistry.get_supported_resolvers()))
"""


def settings(cache, artifact):
    """The environment of a server whose resolver and middleware know the artifact."""
    return {
        "VLLM_PLUGINS": "mediator_resolver",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "MEDIATOR_CACHE": str(cache),
        "MEDIATOR_ARTIFACT": str(artifact),
        "MEDIATOR_RANK": "64",
        "MEDIATOR_BLENDS": "2",
    }


def answer(client, model, prompt):
    options = {"max_tokens": 8, "temperature": 0, "extra_body": {"return_token_ids": True}}
    return client.completions.create(model=model, prompt=prompt, **options)


def test_a_resolver_alone_blends_and_cannot_route(artifact, tmp_path):
    options = [*LORA.split(), "--enforce-eager"]
    with vllm_server.served(artifact, tmp_path, *options, **settings(tmp_path, artifact)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        prompt = served_pico.prompts("math", 1)[0]
        names = ("math", "math=0.5,code=0.5", "dense")
        assert len({answer(client, name, prompt).choices[0].text for name in names}) == 3
        with pytest.raises(openai.NotFoundError, match="auto"):
            answer(client, "auto", prompt)
        answer(client, "math=0.25,code=0.75", prompt)
        with pytest.raises(openai.NotFoundError):
            answer(client, "math=0.125,code=0.875", prompt)
        assert answer(client, "code", prompt).choices[0].text
    log = (tmp_path / "vllm.log").read_text()
    assert "knows the name and not the prompt, and cannot route" in log
    assert "at most 2 names of blends are resolved" in log


def test_a_middleware_without_an_artifact_ends_the_server(artifact, tmp_path):
    options = [*LORA.split(), "--enforce-eager", "--middleware", MIDDLEWARE]
    path = tmp_path / "vllm.log"
    with path.open("wb") as log:
        process = vllm_server.start(
            artifact, vllm_server.free_port(), log, *options, VLLM_PLUGINS="none"
        )
        try:
            process.wait(240)
        finally:
            vllm_server.stop(process)
    lines = [line for line in path.read_text().splitlines() if "mergekit-mediator: " in line]
    assert len(lines) == 1, path.read_text()[-3000:]
    assert "MEDIATOR_ARTIFACT: the directory or the repository" in lines[0]


def registered(**variables):
    """Load vLLM's general plugins in a process with these variables."""
    import os

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    command = [vllm_server.PYTHON, "-c", REGISTER]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_resolver_is_there_where_it_is_named_and_nowhere_else():
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    named = registered(VLLM_PLUGINS="mediator_resolver", **allowed)
    assert named.stdout.splitlines()[-1] == "['mediator_resolver']"
    assert registered(**allowed).stdout.splitlines()[-1] == "[]"


def test_a_resolver_that_vllm_would_not_ask_ends_the_process_with_one_line():
    ended = registered(VLLM_PLUGINS="mediator_resolver")
    assert ended.returncode == 1
    assert "mediator_resolver: vLLM asks no resolver: set VLLM_ALLOW_RUNTIME" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_plugin_serves_a_baked_model_with_the_experts_of_its_artifact(make, merged, tmp_path):
    """Full fine-tunes of a model whose embedding vLLM changes by no adapter: PEFT on the baked model answers alike.

    The prompts are token ids, because vLLM's transformers gives this model another tokenizer.
    """
    family = make(served_pico.wide_qwen2, dtype=torch.float32)
    out = merged(family.config(route="all", bits=2.0, reference="base"))
    folder = tmp_path / "adapters"
    told = figures("export", out, folder, "--bake-mean", "--rank", "64", "--no-embeddings")
    left_out = told["experts"][0]["dropped"]
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(left_out)
    variables = {"MEDIATOR_ARTIFACT": str(out), "MEDIATOR_CACHE": str(tmp_path / "cache")}
    options = [*LORA.split(), "--enforce-eager"]
    with vllm_server.served(folder / "dense", tmp_path, *options, **variables) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert answer(client, "auto", [5, 6, 7]).model_extra["mediator"]["mixture"]
        for name in family.experts:
            plain = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
            adapted = PeftModel.from_pretrained(plain, folder / name)
            for ids in torch.randint(4, 60, (6, 8), generator=torch.Generator().manual_seed(1)):
                mask = torch.ones(1, len(ids), dtype=torch.long)
                inputs = {"input_ids": ids[None], "attention_mask": mask}
                expected = adapted.generate(**inputs, max_new_tokens=8, do_sample=False)
                served = answer(client, name, ids.tolist()).choices[0].model_extra["token_ids"]
                assert served == expected[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def client(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    options = [*LORA.split(), "--enforce-eager", "--served-model-name", "pico"]
    options += ["--middleware", MIDDLEWARE]
    with vllm_server.served(artifact, folder, *options, **settings(folder, artifact)) as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.mark.parametrize("expert", served_pico.WORDS)
def test_auto_is_answered_by_the_expert_of_the_words(client, expert):
    prompt = served_pico.prompts(expert, 1, seed=9)[0]
    routed = answer(client, "auto", prompt)
    assert routed.model == expert
    assert routed.model_extra["mediator"]["mixture"] == {expert: 1.0}
    texts = {name: answer(client, name, prompt).choices[0].text for name in (expert, "dense")}
    assert routed.choices[0].text == texts[expert] != texts["dense"]


def test_a_stream_is_routed(client):
    prompt = served_pico.prompts("code", 1, seed=9)[0]
    options = {"max_tokens": 4, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(model="auto", prompt=prompt, **options))
    assert chunks[0].model == "code"


def test_a_name_that_no_adapter_has_is_refused_and_the_next_request_works(client):
    with pytest.raises(openai.NotFoundError, match="law"):
        answer(client, "law", "w1")
    assert answer(client, "math", "w1 w2").choices[0].text
