"""The routes of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qmix.batch.forms import Told
from qmix.engine.completion import BatchResult
from qmix.errors import QmixError
from qmix.serve import messages, responses
from qmix.serve.asked import CHAT, COMPLETION, Asked, Asker
from qmix.serve.bodies import BODY_COPIES, BODY_LIMIT, KEPT_COPIES, Ledger, announced, read_json
from qmix.serve.errors import ApiError, told
from qmix.serve.events import Encoder, EventStream, WholeAnswer, events, wait_until_gone
from qmix.serve.following import Following
from qmix.serve.guard import Access, Guard
from qmix.serve.metrics import Metrics
from qmix.serve.openai import OpenAIForm
from qmix.serve.service import Service

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


class Form(Encoder, Protocol):
    """The form of one interface's answer, whole or as a stream."""

    @property
    def asked(self) -> Asked: ...

    def whole(self, results: Sequence[BatchResult]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts that the routes use. `model` is the served name, `created` the time when the server started."""

    service: Service
    asker: Asker
    ledger: Ledger
    metrics: Metrics
    told: Callable[[int], Told]
    model: str
    created: int
    ping_seconds: float


class Api:
    """The handlers of the interfaces."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def chat(self, request: Request) -> Response:
        """Answer /v1/chat/completions."""
        return await self._answer(request, self._openai(CHAT))

    async def completions(self, request: Request) -> Response:
        """Answer /v1/completions."""
        return await self._answer(request, self._openai(COMPLETION))

    async def messages(self, request: Request) -> Response:
        """Answer /v1/messages."""

        async def form(body: bytes) -> Form:
            asked, extra = await messages.ask(self.serving.asker, body)
            return messages.MessageForm(asked, self.serving.model, extra)

        return await self._answer(request, form)

    async def count_tokens(self, request: Request) -> Response:
        """Answer /v1/messages/count_tokens."""
        with self.serving.ledger.hold(BODY_COPIES * announced(request, BODY_LIMIT)):
            body = await read_json(request, BODY_LIMIT)
            asked, _ = await messages.ask(self.serving.asker, body, counting=True)
        return JSONResponse({"input_tokens": asked.prompt_tokens})

    async def responses(self, request: Request) -> Response:
        """Answer /v1/responses."""

        async def form(body: bytes) -> Form:
            asked, settings = await responses.ask(self.serving.asker, body)
            return responses.ResponseForm(asked, self.serving.model, settings)

        return await self._answer(request, form)

    async def models(self, request: Request) -> Response:
        """Answer /v1/models, and /v1/models/NAME."""
        name = request.path_params.get("name")
        if name is not None:
            self.serving.asker.check_model(name)
            return JSONResponse(self._model(name))
        names = sorted(self.serving.asker.names)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    def _model(self, name: str) -> dict[str, Any]:
        context = self.serving.asker.asking.encoder.context
        created = self.serving.created
        return {"id": name, "object": "model", "created": created, "owned_by": "qmix", "max_model_len": context}

    async def health(self, request: Request) -> Response:
        """Answer /health."""
        service = self.serving.service
        return JSONResponse({"status": "ok", "running": service.running, "waiting": service.waiting})

    async def figures(self, request: Request) -> Response:
        """Answer /metrics."""
        return Response(self.serving.metrics.text(), media_type="text/plain; version=0.0.4")

    def _openai(self, url: str) -> Callable[[bytes], Awaitable[Form]]:
        async def form(body: bytes) -> Form:
            asked = await self.serving.asker.ask(url, body)
            return OpenAIForm(asked, self.serving.model, self.serving.told)

        return form

    async def _answer(self, request: Request, read: Callable[[bytes], Awaitable[Form]]) -> Response:
        """Read a request, queue it, and answer it as a whole or as a stream."""
        with ExitStack() as held:
            with self.serving.ledger.hold(BODY_COPIES * announced(request, BODY_LIMIT)):
                body = await read_json(request, BODY_LIMIT)
                form = await read(body)
            asked = form.asked
            held.enter_context(self.serving.ledger.hold(KEPT_COPIES * len(body) + asked.answer_bytes))
            del body
            following = Following(self.serving.service, asked.requests, asked.stream, asked.tooling)
            held.callback(following.close)
            if asked.stream:
                return EventStream(events(following, form, self.serving.ping_seconds), held.pop_all().close)
            content = await self._whole(request, following, form)
            if content is None:
                return Response(status_code=499)  # nobody reads it
            return WholeAnswer(content, held.pop_all().close)

    async def _whole(self, request: Request, following: Following, form: Form) -> bytes | None:
        """Return the body of an answer, None where the client has gone away before."""
        answering = asyncio.ensure_future(following.all())
        gone = asyncio.ensure_future(wait_until_gone(request.receive))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            return msgspec.json.encode(form.whole(answering.result())) if answering.done() else None
        finally:
            answering.cancel()
            gone.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)


def make_app(serving: Serving, access: Access, more: Sequence[Route] = ()) -> Any:
    """Return the ASGI application."""
    api = Api(serving)
    routes = [
        Route(CHAT, api.chat, methods=["POST"]),
        Route(COMPLETION, api.completions, methods=["POST"]),
        Route(MESSAGES, api.messages, methods=["POST"]),
        Route(f"{MESSAGES}/count_tokens", api.count_tokens, methods=["POST"]),
        Route(RESPONSES, api.responses, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.models),
        Route("/health", api.health),
        Route("/metrics", api.figures),
        *more,
    ]
    cors = [Middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=routes,
        middleware=cors if access.origins else [],
        exception_handlers={ApiError: _failed, HTTPException: _not_found, QmixError: _failed, Exception: _failed},
    )
    return Counted(Guard(app, access), serving.metrics, {route.path for route in routes})


class Counted:
    """An ASGI application in front of another, which counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


def _answer_error(request: Request, error: ApiError) -> Response:
    body = error.anthropic() if request.url.path.startswith(MESSAGES) else error.openai()
    return JSONResponse(body, error.status, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return _answer_error(request, told(error))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
    return _answer_error(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))
