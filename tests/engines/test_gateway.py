import time
from contextlib import contextmanager

import httpx
import openai
import pytest
from fake_engine import EXPERTS, FakeEngine
from fake_upstream import FakeUpstream
from local_servers import running
from starlette.responses import Response
from starlette.routing import Route

from mergekit_mediator.engines import gateway
from mergekit_mediator.engines.gateway import gateway_app
from mergekit_mediator.engines.replicas import Replicas
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}]}
PLUGIN = ("base", "math", "code", "chat", "dense", "auto")


class Cluster:
    """Two upstreams, and a gateway before them."""

    def __init__(self, models, **options):
        self.router, self.upstreams = FakeEngine(), [FakeUpstream(n, models) for n in "ab"]
        self.options = options

    @contextmanager
    def up(self):
        with running(self.upstreams[0].app) as a, running(self.upstreams[1].app) as b:
            self.urls = (a, b)
            settings = ServiceSettings(**self.options.pop("settings", {}))
            app = gateway_app(EXPERTS, self.router, settings, self.urls, **self.options)
            with running(app) as self.address:
                yield self

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="key", max_retries=0)

    def text(self, model="auto", **more):
        return self.client.chat.completions.create(model=model, **CHAT, **more)

    def counts(self):
        return [len(upstream.asked) for upstream in self.upstreams]

    def metric(self, name):
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture
def cluster(request):
    options = dict(getattr(request, "param", {}))
    with Cluster(options.pop("models", ("base", *EXPERTS)), **options).up() as one:
        yield one


def with_options(**options):
    return pytest.mark.parametrize("cluster", [options], indirect=True)


def test_a_request_is_routed_named_and_forwarded(cluster):
    answer = cluster.text()
    assert answer.choices[0].message.content in ("a:math", "b:math")
    assert answer.model_extra["mediator"]["mixture"] == {"math": 1.0}
    (asked,) = [asked for upstream in cluster.upstreams for asked in upstream.asked]
    assert asked[0] == {**CHAT, "model": "math"}
    assert asked[1]["authorization"] == "Bearer key"


def test_streams_pass_event_by_event_with_the_decision_first(cluster):
    chunks = list(cluster.text(stream=True))
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    assert texts in ([f"{name}{n}" for n in range(3)] for name in "ab")
    assert chunks[0].model_extra["mediator"]["mixture"] == {"math": 1.0}


def test_models_are_those_of_the_engines_and_auto(cluster):
    assert {m.id for m in cluster.client.models.list()} == {"base", *EXPERTS, "auto"}


def test_dense_is_the_engines_own_model(cluster):
    assert cluster.text("dense").choices[0].message.content.endswith(":base")
    assert cluster.text("base").choices[0].message.content.endswith(":base")


def test_the_turns_of_a_conversation_stay_on_one_engine(cluster):
    for _ in range(6):
        cluster.text()
    assert sorted(cluster.counts()) == [0, 6]


def test_different_conversations_are_spread(cluster):
    for n in range(24):
        cluster.client.completions.create(model="code", prompt=f"question {n}")
    assert min(cluster.counts()) >= 4


@with_options(affinity="adapter")
def test_requests_of_one_adapter_stay_on_one_engine_where_that_is_wanted(cluster):
    for n in range(12):
        cluster.client.completions.create(model="code", prompt=f"question {n}")
    assert sorted(cluster.counts()) == [0, 12]


def test_an_engine_that_holds_the_adapter_is_preferred(cluster):
    cluster.upstreams[1].models = ("base", "math")
    with running(gateway_app(EXPERTS, FakeEngine(), ServiceSettings(), cluster.urls)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0)
        for n in range(12):
            client.completions.create(model="code", prompt=f"question {n}")
    assert cluster.counts() == [12, 0]


def test_a_request_without_text_still_gets_an_engine_that_holds_its_adapter(cluster):
    cluster.upstreams[0].models, cluster.upstreams[1].models = ("base", "math"), ("base", "code")
    with running(gateway_app(EXPERTS, FakeEngine(), ServiceSettings(), cluster.urls)) as address:
        for model in ("math", "code"):
            body = {"model": model, "messages": [{"role": "user", "content": []}]}
            httpx.post(f"{address}/v1/chat/completions", json=body)
    asked = [[body["model"] for body, _ in upstream.asked] for upstream in cluster.upstreams]
    assert asked == [["math"], ["code"]]


def test_a_body_that_is_too_large_is_not_kept_in_memory(cluster, monkeypatch):
    monkeypatch.setattr(gateway, "LARGEST_BODY", 100)
    response = httpx.post(
        f"{cluster.address}/v1/audio", content=b"x" * 200, headers={"content-type": "audio/wav"}
    )
    assert response.status_code == 413
    assert cluster.counts() == [0, 0]


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000], ids=["half", "deep"])
def test_a_body_that_is_no_json_is_forwarded_as_it_is_and_the_next_request_works(cluster, body):
    response = httpx.post(f"{cluster.address}/v1/completions", content=body)
    assert response.status_code == 500  # the engine's own answer
    assert cluster.text().choices


@pytest.mark.parametrize("path", ["%2e%2e/admin", "x/%2e%2e/%2e%2e/admin", "..%2Fadmin"])
def test_no_path_leads_out_of_the_api_of_an_engine(cluster, path):
    asked = []

    async def admin(request):
        asked.append(request.url.path)
        return Response()

    for upstream in cluster.upstreams:
        upstream.app.router.routes.append(Route("/admin", admin, methods=["POST"]))
    response = httpx.post(f"{cluster.address}/v1/{path}", json={})
    assert (response.status_code, asked) == (404, [])
    assert response.json()["error"]["message"] == "the path leads out of /v1"


def test_a_path_reaches_the_engine_as_it_came(cluster):
    asked = []

    async def answer(request):
        asked.append((request.scope["path"], request.scope["query_string"]))
        return Response()

    for upstream in cluster.upstreams:
        upstream.app.router.routes.insert(0, Route("/v1/a?b", answer, methods=["POST"]))
    for query in ("", "?c=1"):
        httpx.post(f"{cluster.address}/v1/a%3Fb{query}", json={"model": "math"})
    assert asked == [("/v1/a?b", b""), ("/v1/a?b", b"c=1")]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:y"])
def test_an_address_of_an_engine_that_is_none_of_http_is_refused(url):
    with pytest.raises(EngineError, match="an address such as http://localhost:8000 is required"):
        gateway_app(EXPERTS, FakeEngine(), ServiceSettings(), (url,))


@pytest.mark.parametrize("fault", ["before", 503])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_before_the_first_byte_is_replaced(cluster, fault, stream):
    cluster.text()
    bad, good = (0, 1) if cluster.counts()[0] else (1, 0)
    cluster.upstreams[bad].fault = fault
    answer = cluster.text(stream=stream)
    text = (
        next(iter(answer)).choices[0].delta.content if stream else answer.choices[0].message.content
    )
    assert text[0] == "ab"[good]
    assert cluster.metric("mediator_gateway_retries_total") == 1


def test_a_dead_engine_is_replaced_and_no_request_is_lost(cluster):
    end(cluster.urls[0])
    answers = {
        cluster.client.completions.create(model="code", prompt=f"q {n}").choices[0].text
        for n in range(20)
    }
    assert answers == {"b:code"}
    assert httpx.get(f"{cluster.address}/ready").json()["alive"] == [cluster.urls[1]]


def test_a_stream_that_breaks_is_seen_by_the_client_and_not_repeated(cluster):
    for upstream in cluster.upstreams:
        upstream.fault = "inside"
    with pytest.raises((openai.APIError, httpx.TransportError)):
        list(cluster.text(stream=True))
    assert sum(cluster.counts()) == 1


def test_no_engine_is_an_error_of_the_openai_form(cluster):
    for url in cluster.urls:
        end(url)
    with pytest.raises(openai.InternalServerError, match="no engine answers") as refusal:
        cluster.text()
    assert refusal.value.body["code"] == refusal.value.status_code == 503
    assert httpx.get(f"{cluster.address}/ready").status_code in (200, 503)


def test_an_engine_that_comes_back_is_used_again(cluster, monkeypatch):
    monkeypatch.setattr(gateway, "_SECONDS_BETWEEN_QUESTIONS", 0.05)
    cluster.upstreams[0].fault = cluster.upstreams[1].fault = None
    with running(gateway_app(EXPERTS, FakeEngine(), ServiceSettings(), cluster.urls)) as address:
        port = int(cluster.urls[0].rsplit(":", 1)[1])
        end(cluster.urls[0])
        _wait(lambda: len(httpx.get(f"{address}/ready").json()["alive"]) == 1)
        with running(cluster.upstreams[0].app, port):
            _wait(lambda: len(httpx.get(f"{address}/ready").json()["alive"]) == 2)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("math=x", openai.BadRequestError, "must be a number"),
        ("law=1", openai.NotFoundError, "unknown expert 'law'"),
    ],
)
def test_bad_names_are_refused_without_asking_an_engine(cluster, model, error, message):
    with pytest.raises(error, match=message):
        cluster.text(model)
    assert cluster.counts() == [0, 0]
    assert cluster.text().choices


def test_engines_that_make_no_blends_get_the_likeliest_expert(cluster):
    cluster.router.scores = [1.0, 0.9, -9.0]
    assert cluster.text().choices[0].message.content.endswith(":math")
    with pytest.raises(openai.InternalServerError, match="no engine makes blends"):
        cluster.text("math=0.5,code=0.5")


@with_options(models=PLUGIN)
def test_engines_with_the_plugin_get_blends_and_dense_by_name(cluster):
    cluster.router.scores = [1.0, 0.9, -9.0]
    assert cluster.text().choices[0].message.content.endswith(":math=0.5,code=0.5")
    assert cluster.text("dense").choices[0].message.content.endswith(":dense")


@with_options(template="{base}:{expert}")
def test_engines_that_name_adapters_otherwise_get_their_names(cluster):
    assert cluster.text("code").choices[0].message.content.endswith(":base:code")


@with_options(settings={"ood_action": "refuse"})
def test_a_request_that_is_far_from_all_experts_is_refused(cluster):
    cluster.router.ood = 9.0
    with pytest.raises(openai.BadRequestError, match="is out of distribution"):
        cluster.text()
    assert cluster.counts() == [0, 0]


@pytest.mark.parametrize("template", ["{model}", "adapter", "{"])
def test_a_template_that_names_no_expert_is_refused(template):
    with pytest.raises(EngineError):
        gateway_app(EXPERTS, FakeEngine(), ServiceSettings(), ("http://x",), template)


def test_an_engine_that_is_much_busier_than_others_is_left_alone():
    replicas = Replicas(["http://a", "http://b"], httpx.AsyncClient(), None)
    for replica in replicas.all:
        replica.models = ("math",)
    first, second = replicas.order("math", "x")
    first.in_flight = 4
    assert replicas.order("math", "x") == [first, second]
    first.in_flight = 12
    assert replicas.order("math", "x") == [second, first]
    second.in_flight = 8
    assert replicas.order("math", "x") == [first, second]


def end(url):
    """End an engine; it is gone when this returns."""
    running.stop(url)
    _wait(lambda: not listens(url))


def listens(url):
    try:
        return httpx.get(f"{url}/v1/models").status_code == 200
    except httpx.TransportError:
        return False


def _wait(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
