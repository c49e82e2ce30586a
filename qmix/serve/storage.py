"""The handlers of /v1/files and /v1/batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from qmix.batch.request import LineError
from qmix.files import decode_json
from qmix.serve.batches import Batches, Wanted
from qmix.serve.bodies import BODY_COPIES, BODY_LIMIT, Ledger, announced, read_json
from qmix.serve.errors import ApiError, invalid
from qmix.serve.files import FILE_LIMIT, PART, Files

FORM_BYTES = 2**16  # of an upload besides its file
UPLOAD_BYTES = 3 * 2**20  # of memory: the beginning of a file, fields, and a part that is copied
UPLOAD_SECONDS = 600.0  # for one file to come: 0.35 MB/s for the largest
PAGE, LONGEST_PAGE = 20, 100
T = TypeVar("T", bound=Any)


class Storage:
    """Files and batches over HTTP."""

    def __init__(self, files: Files, batches: Batches, ledger: Ledger) -> None:
        self._files, self._batches, self._ledger = files, batches, ledger

    @property
    def routes(self) -> list[Route]:
        """The routes of both interfaces."""
        return [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files),
            Route("/v1/files/{id}", self.file, methods=["GET", "DELETE"]),
            Route("/v1/files/{id}/content", self.content),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.batches),
            Route("/v1/batches/{id}", self.batch),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def upload(self, request: Request) -> Response:
        """Keep a file of requests."""
        announced(request, FILE_LIMIT + FORM_BYTES)
        bounded = Request(request.scope, _bounded(request.receive, FILE_LIMIT + FORM_BYTES))
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "send the file as multipart/form-data, with the fields 'purpose' and 'file'")
        try:
            with self._ledger.hold(UPLOAD_BYTES):
                reading = bounded.form(max_files=1, max_fields=8, max_part_size=FORM_BYTES)
                form = await asyncio.wait_for(reading, UPLOAD_SECONDS)
                try:
                    file, purpose = form.get("file"), form.get("purpose")
                    if not isinstance(file, UploadFile) or not isinstance(purpose, str):
                        raise invalid("the form must have the fields 'purpose' and 'file'", "file")
                    parts = _parts(file.file)
                    found = await run_in_threadpool(self._files.add, parts, file.filename or "upload", purpose)
                finally:
                    await form.close()
        except asyncio.TimeoutError:
            raise ApiError(408, f"the file did not come within {UPLOAD_SECONDS:.0f} s") from None
        except MultiPartException as error:
            raise invalid(f"the form cannot be read: {error.message}", "file") from None
        return JSONResponse(found.to_json())

    async def files(self, request: Request) -> Response:
        """List files."""
        purpose = request.query_params.get("purpose")
        found = [file for file in self._files.all() if purpose in (None, file.purpose)]
        return _page(request, found, lambda file: file.to_json())

    async def file(self, request: Request) -> Response:
        """Describe or delete a file."""
        name = request.path_params["id"]
        if request.method == "DELETE":
            self._batches.forget_lines(self._files.delete(name))
            return JSONResponse({"id": name, "object": "file", "deleted": True})
        return JSONResponse(self._files.get(name).to_json())

    async def content(self, request: Request) -> Response:
        """Send a file's bytes."""
        file = self._files.get(request.path_params["id"])
        output = self._files.path(file.id) if file.lines_of is None else self._batches.output(file.lines_of)
        if not output.is_file():
            raise ApiError(404, f"the content of {file.id} is gone")
        return StreamingResponse(self._files.content(file, output), media_type="application/jsonl")

    async def create(self, request: Request) -> Response:
        """Queue a batch."""
        with self._ledger.hold(BODY_COPIES * announced(request, BODY_LIMIT)):
            body = await read_json(request, BODY_LIMIT)
            try:
                wanted = decode_json(body, Wanted, "", LineError)
            except LineError as error:
                raise invalid(str(error).removeprefix(": ")) from None
        return JSONResponse(self._batches.create(wanted).to_json())

    async def batches(self, request: Request) -> Response:
        """List batches."""
        return _page(request, self._batches.all(), lambda batch: batch.to_json())

    async def batch(self, request: Request) -> Response:
        """Describe a batch."""
        return JSONResponse(self._batches.get(request.path_params["id"]).to_json())

    async def cancel(self, request: Request) -> Response:
        """Stop a batch."""
        return JSONResponse(self._batches.cancel(request.path_params["id"]).to_json())


def _bounded(receive: Callable[[], Any], limit: int) -> Callable[[], Any]:
    """Return `receive` with an error after `limit` bytes of a body."""
    left = limit

    async def bounded() -> Message:
        nonlocal left
        message: Message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise ApiError(413, f"the body has more than {limit} bytes")
        return message

    return bounded


def _parts(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(PART):
        yield part


def _page(request: Request, found: Sequence[T], shown: Callable[[T], dict[str, Any]]) -> Response:
    """Return a page of a list: at most `limit` entries, those behind the id `after`."""
    given, after = request.query_params.get("limit", str(PAGE)), request.query_params.get("after")
    if not (given.isascii() and given.isdigit() and len(given) < 6 and int(given) >= 1):
        raise invalid(f"limit {given[:20]!r}: must be a number from 1")
    limit = min(int(given), LONGEST_PAGE)
    names = [each.id for each in found]
    start = names.index(after) + 1 if after in names else 0
    page = found[start : start + limit]
    ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {"first_id": None, "last_id": None}
    more = start + limit < len(found)
    return JSONResponse({"object": "list", "data": list(map(shown, page)), "has_more": more, **ends})
