"""The files that `config` writes are what the tools read."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import kubernetes_validate
import pytest
import yaml
from commands import call

from mergekit_mediator.cli.main import main
from mergekit_mediator.engines.deployments import DEPLOYMENTS


def written(*arguments):
    result = call("config", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def check_gateway(words, upstreams):
    """A command of our own, with all engines."""
    assert words[0] == "mergekit-mediator"
    name, command, rest = main.resolve_command(click.Context(main), words[1:])
    values = command.make_context(name, rest).params
    assert values["urls"] == upstreams


def test_the_command_of_vllm_has_a_rank_that_it_takes_and_a_slot_for_each(artifact):
    words = shlex.split(written("vllm", artifact, "--rank", "9"))
    assert words[:4] == ["VLLM_PLUGINS=mediator", "vllm", "serve", str(artifact)]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--max-loras") + 1] == "5"


def test_compose_starts_engines_and_a_gateway_that_knows_them(artifact):
    services = yaml.safe_load(written("compose", artifact, "--replicas", "3"))["services"]
    assert set(services) == {"engine-1", "engine-2", "engine-3", "gateway"}
    check_gateway(
        services["gateway"]["command"], tuple(f"http://engine-{n}:8000" for n in (1, 2, 3))
    )
    for name in ("engine-1", "gateway"):
        assert f"{artifact}:{artifact}:ro" in services[name]["volumes"]


def test_kubernetes_takes_the_manifests(artifact):
    text = written("kubernetes", artifact, "--image", "registry/mediator:1")
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    named = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    engines = named["StatefulSet", "mediator-engine"]["spec"]
    service = named["Service", "mediator-engine"]
    assert engines["serviceName"] == service["metadata"]["name"]
    gateway = named["Deployment", "mediator-gateway"]["spec"]["template"]["spec"]["containers"][0]
    hosts = [f"http://mediator-engine-{n}.mediator-engine:8000" for n in range(2)]
    check_gateway(gateway["command"], tuple(hosts))
    assert gateway["image"] == "registry/mediator:1"


def test_kubernetes_does_not_describe_its_services_as_settings(artifact):
    documents = yaml.safe_load_all(written("kubernetes", artifact))
    pods = [d["spec"]["template"]["spec"] for d in documents if "template" in d["spec"]]
    assert len(pods) == 2
    assert all(pod["enableServiceLinks"] is False for pod in pods)


def test_ray_loads_adapters_from_where_they_are_told_to_be(artifact):
    (application,) = yaml.safe_load(written("ray-serve", artifact, "--adapters", "s3://b/a"))[
        "applications"
    ]
    (model,) = application["args"]["llm_configs"]
    assert model["lora_config"]["dynamic_lora_loading_path"] == "s3://b/a"
    assert model["deployment_config"]["num_replicas"] == 2


def test_semantic_router_knows_every_label_and_a_model_for_each(artifact, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(written("semantic-router", artifact))
    tool = Path(sys.executable).with_name("vllm-sr")
    subprocess.run([tool, "config", "validate", "--config", path], check=True)
    content = yaml.safe_load(path.read_text())
    (signal,) = content["routing"]["signals"]["classifiers"]
    models = {model["name"] for model in content["providers"]["models"]}
    assert signal["labels"] == ["math", "code", "chat"]
    assert models == {*signal["labels"], "dense"}
    decided = {d["modelRefs"][0]["model"] for d in content["routing"]["decisions"]}
    assert decided == set(signal["labels"])


def test_the_image_is_of_the_version_that_the_plugin_needs(artifact):
    assert re.match(r"FROM vllm/vllm-openai:v0\.32\.", written("dockerfile", artifact))


@pytest.mark.parametrize("tool", DEPLOYMENTS)
def test_no_file_has_references_that_people_must_resolve(artifact, tool):
    assert not re.search(r"[&*]id\d", written(tool, artifact, "--adapters", "s3://b/a"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compose", "nowhere/at-all"], "is not in the cache, and the Hub cannot be reached"),
        (["nomad", "OUT"], "'nomad' is not one of"),
        (["vllm", "{artifact}", "--rank", "1000"], "vLLM takes at most 512"),
        (["ray-serve", "{artifact}"], "Ray loads them from s3://, gs://"),
        (["ray-serve", "{artifact}", "--adapters", "/mnt"], "name the folder with --adapters"),
    ],
)
def test_what_cannot_be_deployed_is_refused(artifact, arguments, message):
    result = call("config", *(a.format(artifact=artifact) for a in arguments))
    assert result.exit_code != 0
    assert message in result.output
