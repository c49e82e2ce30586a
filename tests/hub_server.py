"""A stand-in for the Hugging Face hub's file API on 127.0.0.1, which can be told to misbehave.

with HubServer(folder) as hub:              # serves `folder` as every org/name
    HubRepo.open("org/name", endpoint=hub.url)
    hub.requests                            # what was asked, in order
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Request:
    """One request as it came; `sent` counts the bytes of body that went out."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Fault:
    """An action on the next `times` requests whose method and path match."""

    path: str  # a pattern, as for fnmatch
    method: str = "*"
    times: float = 1
    status: int = 0  # answer with this instead
    code: str = ""  # with this X-Error-Code
    break_at: int | None = None  # close the connection after so many bytes of body
    reset: bool = False  # with a TCP reset
    flip_at: int | None = None  # flip a bit of this byte of the file
    cut: int = 0  # serve the file without its last bytes, as if it were so long


NO_FAULT = Fault("")


@dataclass
class HubServer:
    """Serves `root` as every repository except those `missing`, at the given revisions, all the same files.

    With `token`, repositories are private: whoever does not send it is told that they do not exist. With
    `gated`, the listing is public and only the files need the token, as on the hub.
    """

    root: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "c0ffee" + "0" * 34})
    lfs: tuple[str, ...] = ("*.safetensors", "*.bin")
    token: str | None = None
    gated: bool = False
    cdn: bool = False  # send readers of large files to another host, which gets no token
    missing: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go off the network: nothing listens any more, and open connections end."""
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.connections):
            with suppress(OSError):  # it may have ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def fault(self, path: str, **what: Any) -> Fault:
        """Misbehave once (`times=` for more often) towards a path, as `*/resolve/*/config.json`."""
        self.faults.append(Fault(path, **what))
        return self.faults[-1]

    def forget(self) -> None:
        self.requests.clear()

    def gets(self, name: str = "") -> list[Request]:
        """The GET requests for a file, or for all files."""
        of_files = [request for request in self.requests if not request.path.startswith("/api/")]
        return [request for request in of_files if request.method == "GET" and request.path.endswith(name)]

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.revisions.values() else self.revisions.get(revision)

    def entries(self) -> list[dict[str, Any]]:
        """The files as the API lists them: rfilename, size, blobId and, of large ones, lfs."""
        found = []
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            name, size = path.relative_to(self.root).as_posix(), path.stat().st_size
            blob, sha256 = _hashes(path, path.stat().st_mtime_ns, size)
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob}
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.lfs):
                entry["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
            found.append(entry)
        return found

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                of_body = fault.break_at is not None or fault.flip_at is not None
                wanted = fnmatch.fnmatch(method, "GET" if of_body else fault.method)
                if wanted and fnmatch.fnmatch(path, fault.path) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return NO_FAULT


@functools.lru_cache
def _hashes(path: Path, changed: int, size: int) -> tuple[str, str]:
    """The names that git and LFS give to a file's content; it is read again once it has changed."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        authorization = self.headers.get("Authorization")
        self.request_seen = Request(self.command, path, self.headers.get("Range"), authorization)
        hub.requests.append(self.request_seen)
        fault = hub.take_fault(self.command, path)
        raw = urlsplit(self.path).path  # a revision may contain an escaped slash
        api, resolve = _API.fullmatch(raw), _RESOLVE.fullmatch(raw)
        repo = (api or resolve or [None, None])[1]
        known = hub.token is None or authorization == f"Bearer {hub.token}"
        revision = unquote((api and api[3]) or (resolve and resolve[2]) or "main")
        commit = hub.commit_of(revision)
        if fault.status:
            self.refuse(fault.status, fault.code, "as told")
        elif path.startswith("/cdn/"):
            self.send_file(path.removeprefix("/cdn/"), {}, fault)
        elif repo is None:
            self.refuse(404, "", "Not Found")
        elif repo in hub.missing or not (known or hub.gated):
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif hub.gated and not known and resolve:
            self.refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif api:
            entries = hub.entries()
            if api[2] == "tree":
                self.send_json([_tree_entry(entry) for entry in entries])
            else:
                if "blobs=" not in self.path:
                    entries = [{"rfilename": entry["rfilename"]} for entry in entries]
                self.send_json(
                    {"id": repo, "sha": commit, "siblings": entries, "gated": "auto" if hub.gated else False}
                )
        elif resolve:
            self.send_file(unquote(resolve[3]), {"X-Repo-Commit": commit}, fault)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send_body(status, headers, json.dumps({"error": message}).encode())

    def send_json(self, value: Any) -> None:
        self.send_body(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send_file(self, name: str, headers: dict[str, str], fault: Fault) -> None:
        entry = next((entry for entry in self.hub.entries() if entry["rfilename"] == name), None)
        if entry is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        data = bytearray((self.hub.root / name).read_bytes())
        if fault.flip_at is not None:
            data[fault.flip_at] ^= 1
        del data[len(data) - fault.cut :]
        at_hub = bool(headers)
        headers = headers | {"ETag": f'"{entry["blobId"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["sha256"]}"', "X-Linked-Size": str(len(data))}
            if at_hub and self.hub.cdn:
                elsewhere = f"http://localhost:{self.hub.http.server_port}/cdn/{name}"
                self.send_body(302, headers | {"Location": elsewhere}, b"")
                return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.send_body(200, headers, bytes(data), fault)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(data) - 1) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.send_body(206, headers, bytes(data[start:stop]), fault)

    def send_body(self, status: int, headers: dict[str, str], body: bytes, fault: Fault = NO_FAULT) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        part = body if fault.break_at is None else body[: fault.break_at]
        try:
            self.request_seen.sent = len(part)  # before the client can have all of it
            self.wfile.write(part)
        except OSError:
            self.close_connection = True  # the client went away
        if fault.break_at is not None:
            self.close_connection = True
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()


def _tree_entry(entry: dict[str, Any]) -> dict[str, Any]:
    found = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
    if "lfs" in entry:
        lfs = entry["lfs"]
        found["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return found
