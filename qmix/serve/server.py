"""Run the server: a socket, a model, and the loop between them."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from qmix.batch.forms import told_by
from qmix.batch.session import asking_for
from qmix.engine.batch import BatchRunner
from qmix.engine.figures import Requests, Watch
from qmix.errors import QmixError, arg
from qmix.serve.app import Serving, make_app
from qmix.serve.asked import Asker
from qmix.serve.batches import Batches
from qmix.serve.bodies import Ledger
from qmix.serve.events import PING_SECONDS
from qmix.serve.files import Files
from qmix.serve.guard import LOCAL_NAMES, Access
from qmix.serve.metrics import Metrics
from qmix.serve.page import Page
from qmix.serve.protocol import Http
from qmix.serve.service import Service
from qmix.serve.storage import Storage
from qmix.units import plural

MOST_CONNECTIONS = 1024
STALLED_SECONDS = 300  # a client that takes nothing, or does not answer, for so long is gone


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a server: `names` of the model, `context` tokens a request, at most `queue` of them waiting.

    Bodies and log-probabilities of all requests take at most `memory` bytes. Files and batches lie in `directory`.
    """

    names: frozenset[str]
    context: int
    queue: int
    memory: int
    access: Access
    directory: Path
    ping_seconds: float = PING_SECONDS


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes any free one. Raises QmixError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _end_stalled(found)
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        found.close()
        raise QmixError(f"{host}:{port}: {error.strerror or error}; choose another {arg('port')}") from None
    return found


def _end_stalled(listening: socket.socket) -> None:
    """Have the system close accepted connections whose client is gone without a word, or reads nothing (Linux)."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # it also ends the probes of SO_KEEPALIVE
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, STALLED_SECONDS // 5)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, STALLED_SECONDS // 5)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)


def is_local(host: str) -> bool:
    """Return whether only this machine can reach a server at this address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def local_hosts(host: str) -> frozenset[str]:
    """Return the names in a Host header by which clients of this machine reach a local server."""
    return LOCAL_NAMES | {host}


class _Server(uvicorn.Server):
    """uvicorn's server, which tells of the first signal that ends it."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; a second interrupt ends the running ones."""
        first = not self.should_exit
        super().handle_exit(sig, frame)
        if first and sig == signal.SIGINT:
            self._on_stop()


Watching = Callable[[Watch], AbstractContextManager[object]]


def serve(
    runner: BatchRunner,
    settings: Settings,
    listening: socket.socket,
    ready: str,
    say: Callable[[str], None],
    watching: Watching = nullcontext,
) -> None:
    """Serve until a signal comes, and let running requests end; a second interrupt cuts them.

    `say` tells what happens, and `ready` when clients may come; `watching` is entered while they do. Raises
    KeyboardInterrupt at the end; a SIGTERM ends the process.
    """
    asyncio.run(_serve(runner, settings, listening, ready, say, watching))
    raise KeyboardInterrupt  # uvicorn raises the signal again, which does nothing where the shell had it ignored


async def _serve(
    runner: BatchRunner,
    settings: Settings,
    listening: socket.socket,
    ready: str,
    say: Callable[[str], None],
    watching: Watching,
) -> None:
    loop = asyncio.get_running_loop()

    def deliver(work: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(work)

    def on_stop() -> None:
        batches.stop()
        say(f"stopping: still answering {plural(service.running + service.waiting, 'request')}; Ctrl-C again cuts them")

    def requests() -> Requests:
        return Requests(service.running, service.waiting, runner.plan.batch)

    metrics = Metrics(lambda: service)
    with ExitStack() as opened:
        service = Service(runner, settings.queue, deliver, metrics.on_end)
        opened.callback(service.close)
        files = Files(settings.directory)
        batches = Batches(settings.directory, files, service, settings.context)
        opened.callback(batches.close)
        serving = _serving(runner, settings, service, metrics)
        opened.callback(serving.asker.close)
        page = Page(Watch(runner, requests), lambda: server.should_exit)
        app = make_app(serving, settings.access, [*Storage(files, batches, serving.ledger).routes, *page.routes])
        server = _Server(_config(app), on_stop)
        say(ready)
        opened.enter_context(watching(Watch(runner, requests)))
        await server.serve(sockets=[listening])


def _serving(runner: BatchRunner, settings: Settings, service: Service, metrics: Metrics) -> Serving:
    """Return the parts that the routes use."""
    options = {"max_new_tokens": settings.context}  # cut to what a prompt leaves
    asking = asking_for(runner.tokenizer, runner.store.geometry, settings.context, options, secrets.randbelow(2**31))
    return Serving(
        service=service,
        asker=Asker(asking, settings.names, runner.decode),
        ledger=Ledger(settings.memory),
        metrics=metrics,
        told=told_by(runner.tokenizer),
        model=min(settings.names),
        created=int(time.time()),
        ping_seconds=settings.ping_seconds,
    )


def _config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Http,
        log_config=None,
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
    )
