"""The files that deploy engines, gateways and the routers of other projects, as mappings that become YAML."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_mediator.errors import EngineError
from mergekit_mediator.serve.mixture import DENSE_NAME

_ENGINE_PORT, _GATEWAY_PORT, _CLASSIFIER_PORT = 8000, 8080, 8001
_PACKAGES = "filelock zstandard fastapi httpx prometheus-client uvicorn"
_RAY_LOADS_FROM = ("s3://", "gs://", "abfss://", "azure://")


@dataclass(frozen=True)
class Deployment:
    """An artifact on a number of engines.

    Attributes:
        model: the artifact: a directory of the hosts, or a repository on the Hub.
        experts: the names of its experts.
        rank: the largest rank of its adapters; vLLM must allow it.
        replicas: the number of engines.
        image: the image of the containers; it holds vLLM 0.32 and mergekit-mediator.
        adapters: the address of exported adapters in a cloud's storage, from which Ray loads them.
    """

    model: str
    experts: Sequence[str]
    rank: int
    replicas: int = 2
    image: str = "mediator-vllm:0.32"
    adapters: str = ""

    @property
    def slots(self) -> int:
        """The number of adapters in a batch: the experts, a blend, and the dense expert, an adapter on CPUs."""
        return len(self.experts) + 2

    @property
    def folder(self) -> str | None:
        """The directory of the artifact on the hosts; None for a repository on the Hub."""
        return self.model if self.model.startswith("/") else None

    @property
    def engine_command(self) -> list[str]:
        """The command that starts an engine."""
        options = ["--enable-lora", "--max-loras", str(self.slots)]
        options += ["--max-lora-rank", str(self.rank), "--port", str(_ENGINE_PORT)]
        return ["vllm", "serve", self.model, *options]

    def gateway_command(self, upstreams: Sequence[str]) -> list[str]:
        """Return the command that starts a gateway for the engines at these addresses."""
        urls = [word for url in upstreams for word in ("--upstream", url)]
        options = ["--host", "0.0.0.0", "--port", str(_GATEWAY_PORT)]
        return ["mergekit-mediator", "gateway", self.model, *urls, *options]


def dockerfile() -> str:
    """Return the Dockerfile of an image for vLLM and the gateway."""
    return (
        "FROM vllm/vllm-openai:v0.32.0\n"
        f"RUN pip install --no-deps mergekit-mediator && pip install {_PACKAGES} 'mcp>=2'\n"
        "ENTRYPOINT []\n"
    )


def compose(deployment: Deployment) -> dict[str, Any]:
    """Make the file of Docker Compose: engines with one GPU each, and a gateway."""
    mounts = ["cache:/root/.cache"]
    if deployment.folder:
        mounts.append(f"{deployment.folder}:{deployment.folder}:ro")
    gpu = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    engine = {
        "image": deployment.image,
        "command": deployment.engine_command,
        "environment": {"VLLM_PLUGINS": "mediator"},
        "volumes": mounts,
        "deploy": {"resources": {"reservations": {"devices": [gpu]}}},
        "healthcheck": {
            "test": ["CMD", "curl", "-f", f"http://localhost:{_ENGINE_PORT}/health"],
            "interval": "10s",
            "start_period": "10m",
        },
    }
    names = [f"engine-{n}" for n in range(1, deployment.replicas + 1)]
    gateway = {
        "image": deployment.image,
        "command": deployment.gateway_command([f"http://{n}:{_ENGINE_PORT}" for n in names]),
        "volumes": mounts,
        "ports": [f"{_GATEWAY_PORT}:{_GATEWAY_PORT}"],
        "depends_on": {name: {"condition": "service_healthy"} for name in names},
    }
    engines = {name: engine for name in names}
    return {"services": {**engines, "gateway": gateway}, "volumes": {"cache": {}}}


def kubernetes(deployment: Deployment) -> list[dict[str, Any]]:
    """Make the manifests of Kubernetes: engines with names, so that a gateway reaches each; gateways; services."""
    probe = {"httpGet": {"path": "/health", "port": _ENGINE_PORT}}
    engine = {
        "name": "engine",
        "image": deployment.image,
        "command": deployment.engine_command,
        "env": [{"name": "VLLM_PLUGINS", "value": "mediator"}],
        "ports": [{"containerPort": _ENGINE_PORT}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "readinessProbe": {**probe, "periodSeconds": 5},
        "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": 90},
    }
    urls = [
        f"http://mediator-engine-{n}.mediator-engine:{_ENGINE_PORT}"
        for n in range(deployment.replicas)
    ]
    gateway = {
        "name": "gateway",
        "image": deployment.image,
        "command": deployment.gateway_command(urls),
        "ports": [{"containerPort": _GATEWAY_PORT}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": _GATEWAY_PORT}},
        "livenessProbe": {"httpGet": {"path": "/health", "port": _GATEWAY_PORT}},
    }
    folder = deployment.folder
    engines = _workload("StatefulSet", "mediator-engine", deployment.replicas, engine, folder)
    engines["spec"] |= {"serviceName": "mediator-engine", "podManagementPolicy": "Parallel"}
    return [
        _service("mediator-engine", _ENGINE_PORT, {"clusterIP": "None"}),
        engines,
        _service("mediator", _GATEWAY_PORT, {}, "mediator-gateway"),
        _workload("Deployment", "mediator-gateway", 2, gateway, folder),
    ]


def ray_serve(deployment: Deployment) -> dict[str, Any]:
    """Make the file of Ray Serve LLM: it loads exported adapters; a gateway names them `mediator:EXPERT`.

    Raises:
        EngineError: Ray cannot load adapters from their address.
    """
    if not deployment.adapters.startswith(_RAY_LOADS_FROM):
        raise EngineError(
            f"adapters {deployment.adapters!r}: Ray loads them from {', '.join(_RAY_LOADS_FROM)} only: "
            "export them, copy them there, and name the folder with --adapters"
        )
    model = {
        "model_loading_config": {"model_id": "mediator", "model_source": deployment.model},
        "lora_config": {
            "dynamic_lora_loading_path": deployment.adapters,
            "max_num_adapters_per_replica": deployment.slots,
        },
        "engine_kwargs": {
            "enable_lora": True,
            "max_loras": deployment.slots,
            "max_lora_rank": deployment.rank,
        },
        "deployment_config": {"num_replicas": deployment.replicas},
    }
    application = {
        "name": "mediator",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    return {"applications": [application]}


def semantic_router(deployment: Deployment) -> dict[str, Any]:
    """Make the file of vllm-project/semantic-router: `classify` is its classifier, each expert a model of an engine."""
    engine = [{"name": "vllm", "endpoint": f"127.0.0.1:{_ENGINE_PORT}", "protocol": "http"}]
    classifier = {
        "name": "mediator",
        "model_role": "classification",
        "llm_provider": "vllm",
        "llm_endpoint": {
            "name": "classify",
            "address": "127.0.0.1",
            "port": _CLASSIFIER_PORT,
            "protocol": "http",
        },
    }
    signal = {"name": "expert", "type": "sequence_classifier", "model": "mediator"}
    names = (*deployment.experts, DENSE_NAME)
    return {
        "version": "v0.3",
        "listeners": [{"name": "http", "address": "0.0.0.0", "port": 8899}],
        "providers": {
            "defaults": {"model": DENSE_NAME},
            "models": [{"name": name, "backend_refs": engine} for name in names],
        },
        "routing": {
            "signals": {"classifiers": [{**signal, "labels": list(deployment.experts)}]},
            "decisions": [_decision(expert) for expert in deployment.experts],
        },
        "global": {"model_catalog": {"external": [classifier]}},
    }


def _decision(expert: str) -> dict[str, Any]:
    """Make the rule that sends texts with a score of at least 0.5 for an expert to that expert."""
    condition = {"type": "classifier", "name": "expert", "label": expert, "predicate": {"gte": 0.5}}
    rules = {"operator": "AND", "on_unknown": "no_match", "conditions": [condition]}
    return {"name": expert, "priority": 100, "rules": rules, "modelRefs": [{"model": expert}]}


def _workload(
    kind: str, name: str, replicas: int, container: dict[str, Any], folder: str | None
) -> dict[str, Any]:
    """Make pods of one container, which sees a folder of its host if one is named."""
    labels = {"app": name}
    # Without this, Kubernetes describes the service `mediator` in variables such as MEDIATOR_PORT, which look
    # like settings.
    pod: dict[str, Any] = {"containers": [container], "enableServiceLinks": False}
    if folder:
        mount = {"name": "artifact", "mountPath": folder, "readOnly": True}
        pod["containers"] = [{**container, "volumeMounts": [mount]}]
        pod["volumes"] = [{"name": "artifact", "hostPath": {"path": folder}}]
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _service(
    name: str, port: int, fields: Mapping[str, Any], app: str | None = None
) -> dict[str, Any]:
    """Make the service of the pods of an app; the default app has the service's name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": app or name}, "ports": [{"port": port}], **fields},
    }


# The function that makes a tool's file, by the tool's name.
DEPLOYMENTS: dict[str, Callable[[Deployment], Any]] = {
    "compose": compose,
    "kubernetes": kubernetes,
    "ray-serve": ray_serve,
    "semantic-router": semantic_router,
}
