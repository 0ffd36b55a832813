import asyncio
import json

import httpx
import mcp
import pytest
import served_pico
from fake_engine import EXPERTS, FakeEngine
from local_servers import running

from mergekit_mediator.engines.classifier import classifier_app
from mergekit_mediator.engines.deciders import choose_decider
from mergekit_mediator.errors import EngineError
from mergekit_mediator.store.manifest import read_manifest


@pytest.fixture(scope="module")
def address(artifact):
    manifest = read_manifest(artifact)
    decider = choose_decider(artifact, manifest, "auto")
    with running(classifier_app(decider, manifest.expert_names, largest_body=10_000)) as url:
        yield url


def post(address, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{address}/classify", content=content)


def test_a_text_gets_all_experts_with_scores_that_sum_to_one(address):
    for name in served_pico.WORDS:
        (text,) = served_pico.prompts(name, 1, seed=5)
        labels = post(address, {"inputs": text}).json()
        assert labels[0]["label"] == name
        assert {entry["label"] for entry in labels} == {"math", "code", "chat"}
        assert sum(entry["score"] for entry in labels) == pytest.approx(1, abs=1e-4)


def test_several_texts_get_a_list_each(address):
    rows = post(address, {"inputs": ["w1 w2", "w21 w22"]}).json()
    assert [row[0]["label"] for row in rows] == ["math", "code"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is no JSON"),
        ({"inputs": 3}, 400, "text or list of texts"),
        ({"inputs": []}, 400, "text or list of texts"),
        ({"inputs": ["w1", 3]}, 400, "text or list of texts"),
        ([1], 400, "a JSON object is required, got list"),
        (b"[" * 9000, 400, "the body is no JSON"),
        ({"inputs": ["w1"] * 257}, 400, "at most 256 texts are required, got 257"),
        ({"inputs": " "}, 400, "no text to route by"),
        ({"inputs": "w1 " * 5000}, 413, "at most 10000 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests_are_refused_and_the_next_works(address, body, status, message):
    response = post(address, body)
    assert response.status_code == status
    assert message in response.json()["error"]
    assert post(address, {"inputs": "w1"}).status_code == 200


def test_health_readiness_and_metrics_are_told(address):
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    ready = httpx.get(f"{address}/ready").json()
    assert ready["status"] == "ready"
    assert ready["router"].startswith("embedding")
    post(address, {"inputs": "w1"})
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    count = next(x for x in lines if x.startswith('mediator_classify_requests_total{status="200"}'))
    assert float(count.split()[-1]) >= 1


def test_the_tools_of_semantic_router_are_there(address):
    async def ask():
        async with mcp.Client(f"{address}/mcp") as client:
            named = [tool.name for tool in (await client.list_tools()).tools]
            text = (await client.call_tool("classify_text", {"text": "w21 w22"})).content[0].text
            categories = (await client.call_tool("list_categories", {})).content[0].text
            return named, json.loads(text), json.loads(categories)

    named, answer, categories = asyncio.run(ask())
    assert set(named) == {"classify_text", "list_categories"}
    assert categories == {"categories": ["math", "code", "chat"]}
    assert (answer["class"], answer["model"]) == (1, "code")
    assert answer["confidence"] == max(answer["probabilities"])
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-4)


class SlowEngine(FakeEngine):
    """Takes a while to route, or fails."""

    error = None

    async def decide(self, prompts, route_on):
        await asyncio.sleep(0.3)
        if self.error:
            raise self.error
        return await super().decide(prompts, route_on)


def test_more_requests_than_are_allowed_at_once_are_to_try_again():
    with running(classifier_app(SlowEngine(), EXPERTS, most_at_once=2)) as url:

        async def ask():
            async with httpx.AsyncClient() as client:
                asked = [client.post(f"{url}/classify", json={"inputs": "x"}) for _ in range(6)]
                return await asyncio.gather(*asked)

        responses = asyncio.run(ask())
        assert sorted(r.status_code for r in responses) == [200, 200, 503, 503, 503, 503]
        refused = next(r for r in responses if r.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        assert post(url, {"inputs": "x"}).status_code == 200


def test_a_router_that_has_ended_is_not_ready():
    engine = SlowEngine()
    engine.error = EngineError("the router's process has ended")
    with running(classifier_app(engine, EXPERTS)) as url:
        assert httpx.get(f"{url}/ready").status_code == 503
        assert post(url, {"inputs": "x"}).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_shutdown_answers_what_has_begun_and_closes_the_router():
    engine = SlowEngine()
    with running(classifier_app(engine, EXPERTS)) as url:

        async def ask():
            async with httpx.AsyncClient() as client:
                asked = asyncio.create_task(client.post(f"{url}/classify", json={"inputs": "x"}))
                await asyncio.sleep(0.1)
                running.stop(url)
                return (await asked).status_code

        assert asyncio.run(ask()) == 200
    assert engine.log == ["closed"]
