"""Bodies of requests, within bounds: of one, and of all that are in memory together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from qmix.files import TEXT_LIMIT
from qmix.serve.errors import ApiError, busy, invalid

BODY_LIMIT = TEXT_LIMIT  # bytes of one JSON body
BODY_COPIES = 4  # a body as it comes, joined, decoded, and its prompt
KEPT_COPIES = 10  # of a body, until its answer is sent: tokens of its prompts, its options, tools and schemas
BODY_SECONDS = 60.0  # for one body to come


class Ledger:
    """Bytes that requests hold, at most `limit` together. Used in the event loop alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Count bytes while the block runs. Raises ApiError where there is no room for them."""
        if nbytes > self.limit:
            raise invalid(f"the request needs {nbytes} bytes of memory, the server has {self.limit} for all requests")
        if self.held + nbytes > self.limit:
            raise busy("the memory for requests is used up", 1)
        self.held += nbytes
        try:
            yield
        finally:
            self.held -= nbytes


def announced(request: Request, limit: int) -> int:
    """Return the bytes that a body may have: its Content-Length, else `limit`. Raises ApiError where it is larger."""
    length = request.headers.get("content-length", "")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else limit
    if size > limit:
        raise ApiError(413, f"the body has {size} bytes, the server takes {limit}")
    return size


async def read_json(request: Request, limit: int) -> bytes:
    """Return the body of a JSON request. Raises ApiError where it is not JSON, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be JSON: send the header 'Content-Type: application/json'")
    try:
        return await asyncio.wait_for(_read(request, limit), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes")
    return bytes(body)
