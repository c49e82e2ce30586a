"""A stream of server-sent events, which ends when its client goes away and is kept alive by pings."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qmix.engine.completion import BatchResult
from qmix.serve.errors import ApiError, told
from qmix.serve.following import Following, Update

SENT_AT_ONCE = 2**16  # bytes
MARK = secrets.token_hex(16)  # stands for a text until it is known; in nothing that a client chooses
PING_SECONDS = 10.0  # proxies and clients give up on a silent connection after 30 s and more


class Encoder(Protocol):
    """Writes the events of one answer in the form of an interface."""

    def begin(self) -> bytes: ...
    def update(self, update: Update) -> bytes: ...
    def end(self, results: list[BatchResult]) -> bytes: ...
    def ping(self) -> bytes: ...
    def error(self, error: ApiError) -> bytes: ...


def event(data: Any, name: str | None = None) -> bytes:
    """Return one event with JSON data."""
    line = b"" if name is None else b"event: " + name.encode() + b"\n"
    return line + b"data: " + msgspec.json.encode(data) + b"\n\n"


class TextEvents:
    """Makes events that differ in their text alone. `make` returns one of them, which is encoded once."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        self._before, found, self._after = make(MARK).partition(msgspec.json.encode(MARK))
        assert found

    def __call__(self, text: str) -> bytes:
        return self._before + msgspec.json.encode(text) + self._after


async def events(following: Following, encoder: Encoder, ping_seconds: float) -> AsyncGenerator[bytes, None]:
    """Yield the events of a request's answers."""
    yield encoder.begin()
    try:
        while not following.done:
            updates = await following.updates(ping_seconds)
            yield b"".join(map(encoder.update, updates)) if updates else encoder.ping()
        yield encoder.end([result for result in following.results if result is not None])
    except Exception as error:  # the status has been sent: what failed is told in the stream
        yield encoder.error(told(error))


class EventStream(Response):
    """Sends events as they come, until they end or the client goes away; `on_end` is called in either case."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[bytes, None], on_end: Callable[[], object]) -> None:
        self.status_code, self.background, self._content, self._on_end = 200, None, content, on_end
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(wait_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_end()
            gone.cancel()
            sending.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._content.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._content:
            if data:
                await send_parts(send, data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class WholeAnswer(Response):
    """Sends a JSON body; `on_end` is called once the client has taken it, or is gone."""

    media_type = "application/json"

    def __init__(self, content: bytes, on_end: Callable[[], object]) -> None:
        super().__init__(content)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send_parts(send, self.body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_end()


async def send_parts(send: Send, body: bytes | memoryview) -> None:
    """Send a piece of a body in parts: the server waits before each while a slow reader has not taken the last."""
    for start in range(0, len(body), SENT_AT_ONCE):
        part = body if len(body) <= SENT_AT_ONCE else body[start : start + SENT_AT_ONCE]
        await send({"type": "http.response.body", "body": bytes(part), "more_body": True})


async def wait_until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
