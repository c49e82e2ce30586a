"""Checks of keys, hosts and origins, before anything else is done with a request.

A browser lets any web page send requests to this machine. A page of another origin is refused by its Origin header,
and one that rebinds its own name to 127.0.0.1 by its Host header.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from qmix.serve.errors import ApiError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = ("/health", "/")  # for probes, which have no key, and the page, which holds no data


@dataclass(frozen=True, slots=True)
class Access:
    """`key` is what clients must send, None for none. `hosts` are the names that this server answers to, None for any.

    Pages of `origins` may use it besides its own.
    """

    key: str | None = None
    hosts: frozenset[str] | None = LOCAL_NAMES
    origins: Collection[str] = ()

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise ApiError where a request is not allowed."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise ApiError(403, f"host {host[:100]!r}: this server answers to {', '.join(sorted(self.hosts))} only")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and origin.partition("://")[2] != host:
            raise ApiError(403, f"origin {origin[:100]!r}: is not among the web pages that this server allows")
        asks_first = method == "OPTIONS" and origin in self.origins  # a browser before its request, without a key
        if self.key is not None and path not in OPEN_PATHS and not asks_first and not self._opens(headers):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _opens(self, headers: Headers) -> bool:
        """Return whether a key is the right one, in a time that tells nothing of it."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), (self.key or "").encode())


class Guard:
    """An ASGI application in front of another, which lets through what `access` allows."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._access.check(scope["method"], scope["path"], Headers(scope=scope))
            except ApiError as error:
                body = error.anthropic() if scope["path"].startswith("/v1/messages") else error.openai()
                await JSONResponse(body, error.status)(scope, receive, send)
                return
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        await self._app(scope, receive, send)
