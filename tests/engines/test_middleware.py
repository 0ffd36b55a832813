import asyncio
import json

import pytest
from fake_engine import FakeEngine

from mergekit_mediator.engines.middleware import RouteRequests


def upstream(events=None, kind="application/json", status=200):
    """An application that answers with what it was asked, or with the events of a stream."""

    async def app(scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        app.seen = (scope["path"], dict(scope["headers"]), body)
        headers = [(b"content-type", kind.encode())]
        chunks = events or [b'{"asked": %s}' % body]
        if events is None:
            headers.append((b"content-length", str(len(chunks[0])).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, chunk in enumerate(chunks):
            more = i + 1 < len(chunks)
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

    return app


def post(
    app,
    body,
    service=None,
    path="/v1/completions",
    method="POST",
    headers=(),
    parts=1,
    kind=b"application/json",
    messages=None,
):
    """Call an application through the middleware; return status, headers and body.

    The response's messages are added to `messages`.
    """
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    cut = [raw[i * len(raw) // parts : (i + 1) * len(raw) // parts] for i in range(parts)]
    requests = [
        {"type": "http.request", "body": part, "more_body": i + 1 < parts}
        for i, part in enumerate(cut)
    ]
    sent = [] if messages is None else messages

    async def receive():
        return requests.pop(0) if requests else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def find(scope):
        return service

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"content-type", kind), *headers],
    }
    asyncio.run(RouteRequests(app, find)(scope, receive, send))
    (start, *rest) = sent
    whole = b"".join(message.get("body", b"") for message in rest)
    assert not rest[-1].get("more_body")
    headers = dict(start["headers"])
    if b"content-length" in headers:
        assert int(headers[b"content-length"]) == len(whole)
    return start["status"], headers, whole


@pytest.fixture
def service():
    return FakeEngine().service()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_routed_request_reaches_the_application_under_the_name_of_its_adapter(service, parts):
    app = upstream()
    asked = {"model": "auto", "prompt": "2 + 2?", "n": 1}
    status, headers, body = post(app, asked, service, parts=parts)
    answer = json.loads(body)
    assert (status, headers[b"x-mediator-mixture"]) == (200, b"math")
    assert answer["asked"] == {**asked, "model": "math"}
    assert answer["mediator"]["mixture"] == {"math": 1.0}
    assert int(app.seen[1][b"content-length"]) == len(app.seen[2])


def test_a_stream_says_the_decision_in_its_first_event_only(service):
    events = [b'data: {"id": 1', b', "x": 2}\n\ndata: {"id": 2}\n\n', b"data: [DONE]\n\n"]
    app = upstream(events, "text/event-stream; charset=utf-8")
    _, headers, body = post(app, {"model": "auto", "prompt": "x"}, service)
    first, second, last = body.decode().strip().split("\n\n")
    said = json.loads(first.removeprefix("data: "))
    assert (said["id"], said["x"]) == (1, 2)
    assert said["mediator"]["mixture"] == {"math": 1.0}
    assert (second, last) == ('data: {"id": 2}', "data: [DONE]")
    assert headers[b"x-mediator-mixture"] == b"math"


def test_a_stream_whose_lines_end_as_those_of_http_passes_event_by_event(service):
    events = [b'data: {"id": 1}\r\n\r\n', b'data: {"id": 2}\r\n\r\n', b"data: [DONE]\r\n\r\n"]
    messages = []
    app = upstream(events, "text/event-stream")
    _, _, body = post(app, {"model": "auto", "prompt": "x"}, service, messages=messages)
    assert [m["body"] for m in messages[2:]] == events[1:]
    first = body.split(b"\r\n\r\n")[0]
    assert json.loads(first.removeprefix(b"data: "))["mediator"]["mixture"] == {"math": 1.0}


def test_a_content_type_in_capitals_is_json_too(service):
    app = upstream()
    _, headers, _ = post(
        app, {"model": "auto", "prompt": "x"}, service, kind=b"Application/JSON; charset=utf-8"
    )
    assert headers[b"x-mediator-mixture"] == b"math"


@pytest.mark.parametrize(
    ("say", "header", "body"),
    [
        ("header,body", True, True),
        ("header", True, False),
        ("body", False, True),
        ("none", False, False),
    ],
)
def test_the_decision_is_said_where_the_settings_want_it(say, header, body):
    service = FakeEngine().service(say=say)
    _, headers, answer = post(upstream(), {"model": "auto", "prompt": "x"}, service)
    assert (b"x-mediator-mixture" in headers) == header
    assert ("mediator" in json.loads(answer)) == body


def test_errors_of_the_application_pass_unchanged_but_for_the_header(service):
    status, headers, body = post(upstream(status=400), {"model": "math", "prompt": "x"}, service)
    assert status == 400
    assert "mediator" not in json.loads(body)
    assert headers[b"x-mediator-mixture"] == b"math"


def test_a_request_that_names_no_model_is_answered_by_the_dense_expert(service):
    for asked in ({"prompt": "x"}, {"prompt": "x", "model": ""}, {"prompt": "x", "model": None}):
        _, headers, body = post(upstream(), asked, service)
        assert json.loads(body)["asked"]["model"] == "dense"
        assert headers[b"x-mediator-mixture"] == b"dense"


def test_a_body_that_is_too_large_is_refused_before_it_is_read_to_its_end(service, monkeypatch):
    monkeypatch.setattr("mergekit_mediator.engines.middleware.LARGEST_BODY", 100)
    app = upstream()
    status, _, body = post(app, {"model": "auto", "prompt": "x" * 200}, service, parts=2)
    assert status == 413
    assert "a body of at most" in json.loads(body)["error"]["message"]
    assert not hasattr(app, "seen")


def test_a_refusal_is_an_error_of_the_openai_form(service):
    status, _, body = post(upstream(), {"model": "law=1", "prompt": "x"}, service)
    assert status == 404
    error = json.loads(body)["error"]
    assert error["message"] == "unknown expert 'law'; this model has math, code, chat"
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)


@pytest.mark.parametrize(
    "options",
    [
        {"body": {"model": "another", "prompt": "x"}},
        {"body": {"adapter": "x"}},
        {"body": {"model": 3}},
        {"body": [1, 2]},
        {"body": b"{"},
        {"body": b"[" * 100_000},
        {"body": {"model": "auto"}, "method": "PUT"},
        {"body": {"model": "auto"}, "headers": [(b"content-type", b"audio/wav")]},
    ],
    ids=lambda options: str(options)[:40],
)
def test_everything_else_passes_untouched(service, options):
    app = upstream()
    body = options.pop("body")
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    _, headers, answer = post(app, raw, service, **options)
    assert app.seen[2] == raw
    assert b"x-mediator-mixture" not in headers
    assert b"mediator" not in answer


def test_while_there_is_no_service_requests_pass_untouched():
    app = upstream()
    post(app, {"model": "auto"}, None)
    assert json.loads(app.seen[2]) == {"model": "auto"}
