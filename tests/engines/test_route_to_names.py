"""The middleware for engines without the plugin, around an application that answers with the model it was asked for."""

import asyncio
import json

import pytest
import served_pico
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from mergekit_mediator.engines.route_to_names import RouteToNames


def engine():
    """An engine's application, with vLLM's way of adding the middleware."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request):
        return {"asked": (await request.json()).get("model")}

    app.add_middleware(RouteToNames)
    return app


@pytest.fixture
def client(artifact, monkeypatch):
    monkeypatch.setenv("MEDIATOR_ARTIFACT", str(artifact))
    with TestClient(engine()) as client:
        yield client


def ask(client, **body):
    return client.post("/v1/completions", json=body)


def test_auto_becomes_the_name_of_the_expert_of_the_prompt(client):
    for name in served_pico.WORDS:
        prompt = served_pico.prompts(name, 1, seed=4)[0]
        response = ask(client, model="auto", prompt=prompt)
        assert response.json()["asked"] == name
        assert response.headers["x-mediator-mixture"] == name
        assert response.json()["mediator"]["mixture"] == {name: 1.0}


def test_an_unsure_request_goes_to_the_likeliest_expert(artifact, monkeypatch):
    monkeypatch.setenv("MEDIATOR_ARTIFACT", str(artifact))
    monkeypatch.setenv("MEDIATOR_POLICY", "soft")
    monkeypatch.setenv("MEDIATOR_GRID", "64")
    prompt = " ".join(f"w{i}" for i in (0, 1, 2, 3, 20, 21))
    with TestClient(engine()) as client:
        assert ask(client, model="auto", prompt=prompt).json()["asked"] == "math"


def test_names_of_the_engine_pass_and_the_dense_expert_has_the_empty_name(client):
    assert ask(client, model="served", prompt="w1").json()["asked"] == "served"
    assert ask(client, model="math", prompt="w1").json()["asked"] == "math"
    assert ask(client, model="dense", prompt="w1").json()["asked"] == ""
    assert ask(client, prompt="w1").json()["asked"] == ""


def test_a_named_blend_is_refused_and_the_next_request_works(client):
    response = ask(client, model="math=0.5,code=0.5", prompt="w1")
    assert response.status_code == 503
    assert "this engine makes no blends" in response.json()["error"]["message"]
    assert ask(client, model="code", prompt="w1").json()["asked"] == "code"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MEDIATOR_ARTIFACT: the directory or the repository of the artifact is required"),
        ({"MEDIATOR_ARTIFACT": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"MEDIATOR_POLCY": "soft"}, "MEDIATOR_POLCY: there is no such setting"),
    ],
)
def test_a_server_that_cannot_route_does_not_start(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sent = []

    async def run():
        async def receive():
            return {"type": "lifespan.startup"}

        async def send(message):
            sent.append(message)

        await engine()({"type": "lifespan", "state": {}}, receive, send)

    asyncio.run(run())
    (answer,) = sent
    assert answer["type"] == "lifespan.startup.failed"
    assert answer["message"].startswith("mergekit-mediator: ")
    assert message in answer["message"]
    assert "\n" not in json.loads(json.dumps(answer["message"]))
