"""The gateway before a stand-in for llama.cpp's server; the real one is in `tests/engines/llama_cpp`."""

import httpx
import openai
import pytest
from fake_engine import EXPERTS, FakeEngine
from fake_upstream import FakeUpstream
from local_servers import running

from mergekit_mediator.engines.gateway import gateway_app
from mergekit_mediator.engines.llama_cpp import with_scales
from mergekit_mediator.engines.settings import ServiceSettings

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}]}
FILES = ("/m/code.gguf", "/m/math.gguf", "/m/chat.gguf", "/other/style.gguf")


@pytest.fixture
def front(request):
    """A gateway before one server, the server, and the router."""
    upstream, router = FakeUpstream("a", files=getattr(request, "param", FILES)), FakeEngine()
    with running(upstream.app) as url:
        app = gateway_app(EXPERTS, router, ServiceSettings(), (url,))
        with running(app) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0)
            yield client, upstream, router


def scales(upstream):
    """The scales by file of the last request."""
    body, _ = upstream.asked[-1]
    return {FILES[entry["id"]]: entry["scale"] for entry in body["lora"]}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("math", {"/m/math.gguf": 1.0}),
        ("math=0.625,code=0.375", {"/m/math.gguf": 0.625, "/m/code.gguf": 0.375}),
        ("chat=0.5", {"/m/chat.gguf": 0.5}),
        ("dense", {}),
        ("/m/dense.gguf", {}),
        ("auto", {"/m/math.gguf": 1.0}),
    ],
)
def test_a_request_gives_the_scale_of_every_adapter(front, model, expected):
    client, upstream, _ = front
    answer = client.chat.completions.create(model=model, **CHAT)
    assert scales(upstream) == {**dict.fromkeys(FILES, 0.0), **expected}
    assert answer.model_extra["mediator"]["mixture"].keys() == {
        name.removeprefix("/m/").removesuffix(".gguf") for name in expected
    }


def test_an_unsure_request_gets_a_blend(front):
    client, upstream, router = front
    router.scores = [1.0, 0.9, -9.0]
    client.chat.completions.create(model="auto", **CHAT)
    assert scales(upstream) == {
        **dict.fromkeys(FILES, 0.0),
        **{"/m/math.gguf": 0.5, "/m/code.gguf": 0.5},
    }


def test_scales_that_a_client_sends_are_replaced(front):
    client, upstream, _ = front
    mine = {"lora": [{"id": 3, "scale": 9.0}]}
    client.chat.completions.create(model="code", **CHAT, extra_body=mine)
    assert scales(upstream) == {**dict.fromkeys(FILES, 0.0), "/m/code.gguf": 1.0}


@pytest.mark.parametrize(("said", "expected"), [({}, False), ({"cache_prompt": True}, True)])
def test_the_servers_cache_of_other_mixtures_is_used_only_if_a_client_asks(front, said, expected):
    client, upstream, _ = front
    client.chat.completions.create(model="code", **CHAT, extra_body=said)
    assert upstream.asked[-1][0]["cache_prompt"] is expected


def test_models_are_the_servers_own_and_its_adapters(front):
    client, _, _ = front
    assert {m.id for m in client.models.list()} == {"/m/dense.gguf", *EXPERTS, "style", "auto"}


@pytest.mark.parametrize("front", [FILES[:1]], indirect=True)
@pytest.mark.parametrize("model", ["math", "math=0.5,code=0.5", "gpt-4"])
def test_an_adapter_that_the_server_lacks_is_refused_and_the_next_request_works(front, model):
    client, upstream, _ = front
    with pytest.raises(openai.NotFoundError, match=r"which has code|unknown expert 'math'"):
        client.chat.completions.create(model=model, **CHAT)
    assert upstream.asked == []
    assert client.chat.completions.create(model="code", **CHAT).choices


@pytest.mark.parametrize("front", [()], indirect=True)
def test_a_server_without_adapters_answers_as_the_dense_expert_alone(front):
    client, upstream, _ = front
    with pytest.raises(openai.NotFoundError, match="math: an adapter of the engine is required"):
        client.chat.completions.create(model="math", **CHAT)
    assert client.chat.completions.create(model="dense", **CHAT).choices
    assert upstream.asked[-1][0]["lora"] == []


def test_streams_pass(front):
    client, upstream, _ = front
    chunks = list(client.chat.completions.create(model="code", stream=True, **CHAT))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["a0", "a1", "a2"]
    assert scales(upstream)["/m/code.gguf"] == 1.0


def test_a_body_that_is_no_json_passes_as_it_is(front):
    assert with_scales(b"[1]", {"math": 0}, "base") == b"[1]"
    client, _, _ = front
    response = httpx.post(f"{client.base_url}completions", content=b"{")
    assert response.status_code == 500  # the engine's own answer
