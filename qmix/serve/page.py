"""The page at `/`, which tries the model and shows how it works, and the stream of figures behind it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from qmix.engine.figures import Watch
from qmix.serve.errors import busy
from qmix.serve.events import EventStream, event

PERIOD = 0.25  # seconds between two events
MOST_WATCHERS = 16  # each of them holds one event, which all have in common
STUCK_SECONDS = 30.0  # a watcher that reads nothing for so long is dropped
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def read_page() -> str:
    """Return the page: one file with its scripts and styles."""
    return resources.files(__package__).joinpath("page.html").read_text("utf-8")


def policy_of(page: str) -> str:
    """Return the Content-Security-Policy of a page: its own script and style, requests to its own server, no more."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(page):
        allowed[kind].append(f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    parts = ["default-src 'none'", *(f"{kind}-src {' '.join(hashes)}" for kind, hashes in allowed.items())]
    parts += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return "; ".join(parts)


class Page:
    """The page and its figures, taken a few times a second while somebody watches.

    A watcher that reads slowly gets fewer events: the next one is made when the last one is sent. `ending` says that
    the server ends, which ends the streams.
    """

    def __init__(self, watch: Watch, ending: Callable[[], bool]) -> None:
        self._watch, self._ending = watch, ending
        page = read_page()
        self._content = page.encode()
        self._headers = {
            "Content-Security-Policy": policy_of(page),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        self._watchers = 0
        self._latest, self._taken = b"", float("-inf")

    @property
    def routes(self) -> list[Route]:
        """The routes of the page and of its figures."""
        return [Route("/", self.page), Route("/live", self.live)]

    async def page(self, request: Request) -> Response:
        """Answer /, which holds no data and needs no key."""
        return Response(self._content, media_type="text/html; charset=utf-8", headers=self._headers)

    async def live(self, request: Request) -> Response:
        """Answer /live with a stream of figures. Raises ApiError where as many watch as may."""
        if self._watchers >= MOST_WATCHERS:
            raise busy(f"{MOST_WATCHERS} watch already, which is the most", 10)
        self._watchers += 1
        return _Watching(self._events(), self._leave)

    def _leave(self) -> None:
        self._watchers -= 1

    async def _events(self) -> AsyncGenerator[bytes, None]:
        while not self._ending():
            yield self._event()
            await asyncio.sleep(PERIOD)

    def _event(self) -> bytes:
        """Return an event with figures at most a period old."""
        now = time.monotonic()
        if now - self._taken > PERIOD / 2:
            self._latest, self._taken = event(self._watch.figures().to_json()), now
        return self._latest


class _Watching(EventStream):
    """A stream whose client is dropped where it does not read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient(message: Message) -> None:
            await asyncio.wait_for(send(message), STUCK_SECONDS)

        await super().__call__(scope, receive, patient)
