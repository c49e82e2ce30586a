"""Measure what an event of a stream costs the server's event loop, with an engine that counts in place of a model.

    python benchmarks/serve_events.py --clients 64 --requests 512 --tokens 100

Seconds are processor time of the loop's thread, which depends little on what else the machine does. The last figure
is the part of the system call that hands an event to the network, measured alone with as many bytes. Requests
themselves are included: more tokens for each make their part smaller. Prints one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
from serve_load import bodies_of, load

from qmix.commands.serve import _planned
from qmix.engine.batch import BatchRunner
from qmix.engine.completion import BatchResult
from qmix.engine.running import BatchRequest, OnToken
from qmix.engine.sampler import Chosen
from qmix.serve.guard import Access
from qmix.serve.server import Settings, listen, serve

CONTEXT = 512
PASS_SECONDS = 0.01
EVENT_BYTES = 220


class Counting:
    """A runner whose passes wait for a moment, and give each sequence the same word."""

    def __init__(self, runner: BatchRunner) -> None:
        self._runner, self._running, self.tokens = runner, dict[str, tuple[BatchRequest, OnToken, list[Chosen]]](), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def begin(self, request: BatchRequest, on_token: OnToken) -> str:
        self._running[request.name] = request, on_token, []
        return request.name

    def drop(self, name: str) -> None:
        self._running.pop(name, None)

    def start_over(self) -> None:
        self._running.clear()

    def step(self) -> list[BatchResult]:
        time.sleep(PASS_SECONDS)
        done = []
        for name, (request, on_token, tokens) in list(self._running.items()):
            tokens.append(Chosen(5))
            on_token(tokens[-1], " word")
            self.tokens += 1
            if len(tokens) == request.sampling.max_new_tokens:
                text, ids = " word" * len(tokens), [5] * len(tokens)
                done.append(BatchResult(text, ids, "length", len(request.prompt), name, request.index, tokens))
                del self._running[name]
        return done


def system_call() -> float:
    """Return the seconds that one event takes on its way to a client that waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        other, _ = server.accept()
        threading.Thread(target=lambda: [*iter(lambda: other.recv(2**16), b"")], daemon=True).start()
        times = []
        for _ in range(5000):
            started = time.thread_time()
            client.send(b"x" * EVENT_BYTES)
            times.append(time.thread_time() - started)
            time.sleep(0)
        return sum(times) / len(times)


@click.command()
@click.option("--clients", default=64, show_default=True)
@click.option("--requests", default=512, show_default=True)
@click.option("--tokens", default=100, show_default=True)
@click.option("--client", "url", hidden=True, help="be the clients of a server")
def main(clients: int, requests: int, tokens: int, url: str | None) -> None:
    """Print one JSON line."""
    if url is not None:
        asyncio.run(load(url, bodies_of(0, requests, 24, tokens), clients, stream=True))
        return
    store, plan, context = _planned(
        "tiny",
        gpu=(),
        ram=2**31,
        context=CONTEXT,
        kv_cache=clients * CONTEXT,
        batch=clients,
        precision=None,
        clip=False,
        dtype=None,
        plan=None,
    )
    listening = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    asking = [sys.executable, __file__, f"--clients={clients}", f"--requests={requests}", f"--tokens={tokens}"]
    begun: list[float] = []

    def ask() -> None:
        subprocess.run([*asking, "--client", address], check=True)
        os.kill(os.getpid(), signal.SIGINT)

    def say(line: str) -> None:
        if not begun:  # the first line: clients may come
            begun.append(time.thread_time())
            threading.Thread(target=ask).start()

    with BatchRunner(store, plan) as runner, tempfile.TemporaryDirectory() as directory:
        counting = Counting(runner)
        settings = Settings(frozenset({"tiny"}), context, requests, 2**26, Access(), Path(directory))
        try:
            serve(counting, settings, listening, "ready", say)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            seconds = (time.thread_time() - begun[0]) / counting.tokens
    print(json.dumps({"tokens": counting.tokens, "event_us": 1e6 * seconds, "system_call_us": 1e6 * system_call()}))


if __name__ == "__main__":
    main()
