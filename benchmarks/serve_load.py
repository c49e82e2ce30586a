"""Load `qmix serve` with many clients, and compare its tokens/s with `qmix batch` on the same requests.

    python benchmarks/serve_load.py --clients 64 --requests 256 --tokens 64
    python benchmarks/serve_load.py STORE --clients 64 --requests 64 --tokens 8 --ram 4GiB

Both answer the same prompts greedily with as many places, in turns; the server is started once. Clients are plain
sockets in this process. They share the cores with the server, as a browser on the same machine would. Times to the
first token are those of streams, seen by the client, the wait for a place included. Prints a table, then one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import click

WORDS = ["install", "the", "package", "file", "menu", "click", "button", "to", "open", "window", "save", "print", "in"]
ADDRESS = re.compile(r"serving .* at (http://\S+): ")
COMMAND = [sys.executable, "-m", "cli"]


@dataclass(frozen=True, slots=True)
class Load:
    """Answered requests: seconds in all, new tokens, and the sorted times to the first token of streams.

    `server` and `clients` are the seconds of the processor that either took.
    """

    seconds: float
    tokens: int
    first: list[float]
    server: float = 0.0
    clients: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def bodies_of(seed: int, requests: int, words: int, tokens: int) -> list[dict[str, Any]]:
    """Return requests with prompts of `words` words, greedy, of exactly `tokens` new tokens.

    Each seed gives others: a server keeps the prefixes of prompts that it has seen.
    """
    chosen = random.Random(seed)
    prompts = [" ".join(chosen.choices(WORDS, k=words)) for _ in range(requests)]
    return [{"prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} for text in prompts]


def batch(model: str, bodies: Sequence[dict[str, Any]], options: Sequence[str]) -> dict[str, Any]:
    """Return the summary of `qmix batch` over the requests."""
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory, "in.jsonl"), Path(directory, "out.jsonl")
        source.write_text("".join(json.dumps({"id": str(name)} | body) + "\n" for name, body in enumerate(bodies)))
        command = [*COMMAND, "batch", str(source), "-o", str(output), "-m", model, "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


async def ask(host: str, port: int, body: dict[str, Any]) -> float | None:
    """Send a request, read its answer to the end, and return the seconds until the first token of a stream."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    started, first = time.perf_counter(), None
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise click.ClickException(f"{status!r} {await reader.read()!r}")
    while part := await reader.read(2**16):
        if first is None and b"data: " in part:
            first = time.perf_counter() - started
    writer.close()
    return first


async def load(url: str, bodies: Sequence[dict[str, Any]], clients: int, stream: bool) -> Load:
    """Answer all requests with so many clients, each of which asks one after another."""
    address, left, first = urlsplit(url), list(bodies), list[float]()
    assert address.hostname is not None
    assert address.port is not None

    async def client() -> None:
        while left:
            found = await ask(str(address.hostname), int(address.port or 0), left.pop() | {"stream": stream})
            first.extend([] if found is None else [found])

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(time.perf_counter() - started, sum(body["max_tokens"] for body in bodies), sorted(first))


def measured(
    server: subprocess.Popen[str], url: str, bodies: Sequence[dict[str, Any]], clients: int, stream: bool
) -> Load:
    """Return a load with the seconds of the processor that it took."""
    before = processor_seconds(server.pid), time.process_time()
    found = asyncio.run(load(url, bodies, clients, stream))
    own = time.process_time() - before[1]
    return replace(found, server=processor_seconds(server.pid) - before[0], clients=own)


def processor_seconds(process: int) -> float:
    """Return the seconds that a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(process: subprocess.Popen[str]) -> int:
    """Return the most resident bytes of a process."""
    match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def figure(url: str, name: str) -> float:
    """Return a figure of the server's /metrics."""
    with urlopen(f"{url}/metrics") as answer:
        match = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.M)
    assert match is not None
    return float(match[1])


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the summary of `qmix batch`, both loads of the server, and the server's peak bytes so far."""

    batch: dict[str, Any]
    whole: Load
    streams: Load
    peak: int


def thousand(loads: Sequence[Load], who: str) -> float:
    """Return the seconds of the processor that 1000 new tokens took."""
    return float(1000 * sum(getattr(each, who) for each in loads) / sum(each.tokens for each in loads))


def table(rounds: Sequence[Round], budget: float, hit_rate: float) -> str:
    """Return a table in Markdown."""
    lines = ["| | `qmix batch` | server, answers as a whole | server, streams |", "|---|---:|---:|---:|"]
    for number, each in enumerate(rounds, 1):
        rates = [f"{load.rate:.4g} ({load.rate / each.batch['tok_s']:.0%})" for load in (each.whole, each.streams)]
        lines.append(f"| new tokens/s, round {number} | {each.batch['tok_s']:.4g} | {rates[0]} | {rates[1]} |")
    for who in ("server", "clients"):
        used = [thousand([each.whole for each in rounds], who), thousand([each.streams for each in rounds], who)]
        lines.append(f"| processor seconds of the {who} for 1000 new tokens | | {used[0]:.3f} | {used[1]:.3f} |")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        times = sorted(each.streams.first[int(share * (len(each.streams.first) - 1))] for each in rounds)
        lines.append(f"| time to the first token, {name} | | | {times[0]:.2f} to {times[-1]:.2f} s |")
    peaks = max(each.batch["peak_memory"] for each in rounds), max(each.peak for each in rounds)
    lines.append(f"| peak memory, of {budget / 1e9:.2f} GB | {peaks[0] / 1e9:.2f} GB | {peaks[1] / 1e9:.2f} GB | |")
    lines.append(f"| experts in memory when used | {rounds[-1].batch['hit_rate']:.0%} | {hit_rate:.0%} | |")
    return "\n".join(lines)


@click.command()
@click.argument("model", default="tiny")
@click.option("--clients", default=64, show_default=True)
@click.option("--requests", default=256, show_default=True)
@click.option("--words", default=24, show_default=True, help="of each prompt")
@click.option("--tokens", default=64, show_default=True, help="of each answer")
@click.option("--rounds", "count", default=3, show_default=True, help="batch and server take turns in each")
@click.option("--ram", default="2GiB", show_default=True)
@click.option("--context", default=512, show_default=True)
def main(model: str, clients: int, requests: int, words: int, tokens: int, count: int, ram: str, context: int) -> None:
    """Print a table, then one JSON line."""
    common = ["--ram", ram, "--context", str(context), "--batch", str(clients)]
    arena = str(max(context, clients * (8 * words + tokens)))
    served = [*COMMAND, "serve", model, "--port", "0", *common, "--kv-cache", arena]
    server = subprocess.Popen(served, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(match[1] for line in server.stderr if (match := ADDRESS.search(line)))
    rounds: list[Round] = []
    try:
        for number in range(count):
            same, others = (bodies_of(2 * number + kind, requests, words, tokens) for kind in (0, 1))
            summary = batch(model, same, common)
            whole = measured(server, url, same, clients, stream=False)
            streams = measured(server, url, others, clients, stream=True)
            rounds.append(Round(summary, whole, streams, peak(server)))
        budget, hit_rate = figure(url, "qmix_memory_budget_bytes"), figure(url, "qmix_expert_hit_rate")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    print(f"{model}: {clients} clients, {requests} requests of {words} words and {tokens} new tokens\n")
    print(table(rounds, budget, hit_rate) + "\n")
    print(json.dumps([asdict(each) for each in rounds]))


if __name__ == "__main__":
    main()
