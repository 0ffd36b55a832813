"""A stand-in for an engine behind a gateway: it answers with what it was asked, or fails as it is told."""

import asyncio
import json

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route


class FakeUpstream:
    """Notes the requests that it gets.

    Attributes:
        asked: the bodies and headers of requests, in their order.
        fault: `before` breaks the connection before the first event, or inside an answer that is no stream;
            `inside` after the first event; a number is the status that all requests get.
    """

    def __init__(self, name, models=("base", "math", "code", "chat"), files=None):
        """`files` are the adapters of llama.cpp's server, which lists its own model alone."""
        self.name, self.models, self.asked, self.fault = name, models, [], None
        self.files = files
        routes = [
            Route("/v1/models", self.list),
            Route("/lora-adapters", self.list_files),
            Route("/v1/{path:path}", self.answer, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def list(self, request):
        if self.files is not None:
            return JSONResponse({"data": [{"id": "/m/dense.gguf", "owned_by": "llamacpp"}]})
        cards = [
            {"id": n, "parent": None if n in ("base", "auto") else "base"} for n in self.models
        ]
        return JSONResponse({"data": cards})

    async def list_files(self, request):
        assert self.files is not None, "only llama.cpp's server has this address"
        return JSONResponse(
            [{"id": n, "path": file, "scale": 0.0} for n, file in enumerate(self.files)]
        )

    async def answer(self, request):
        body = await request.json()
        self.asked.append((body, dict(request.headers)))
        if isinstance(self.fault, int):
            return JSONResponse({"error": {"message": "told to"}}, self.fault)
        if self.fault == "before" and not body.get("stream"):
            headers = {"content-length": "1000", "content-type": "application/json"}
            return StreamingResponse(self.half(), headers=headers)
        if body.get("stream"):
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        text = f"{self.name}:{body['model']}"
        choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "stop"
        content = {"id": "1", "object": "x", "created": 0, "model": body["model"]}
        return JSONResponse({**content, "choices": [choice]}, headers={"x-replica": self.name})

    async def events(self, body):
        for n in range(3):
            if (self.fault, n) in (("before", 0), ("inside", 1)):
                raise ConnectionAbortedError
            delta = {"content": f"{self.name}{n}"}
            chunk = {"id": "1", "object": "x", "created": 0, "model": body["model"]}
            choices = [{"index": 0, "delta": delta, "finish_reason": None}]
            yield f"data: {json.dumps({**chunk, 'choices': choices})}\n\n"
            await asyncio.sleep(0.01)
        yield "data: [DONE]\n\n"

    async def half(self):
        yield b'{"choices"'
        raise ConnectionAbortedError
