"""Every parser of qmix by name: documents that it takes, and a call that reads bytes as they would come from a user.

`parse` raises a QmixError where it refuses; anything else that it raises is a failure. A parser that is added to qmix
is added here.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any
from unittest import mock

from checkpoints import TINY_CONFIG, random_weights, write_checkpoint, write_mistral
from safetensors.torch import save
from stores import make_store
from transformers import AutoTokenizer

from qmix.batch.lines import Requests
from qmix.batch.output import FileAnswers
from qmix.chat import record, slash
from qmix.chat.format import format_of
from qmix.chat.session import Session
from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.hub import parse as parse_hub_id
from qmix.checkpoint.reader import read_config
from qmix.checkpoint.safetensors_header import read_header
from qmix.checkpoint.source import LocalSource
from qmix.engine.generation_config import parse_generation_config
from qmix.errors import UsageError
from qmix.evaluate.results import REQUESTS, Results
from qmix.evaluate.tasks import load_tasks, own_tasks
from qmix.machine import found as machine
from qmix.machine import measured as machine_profile
from qmix.machine.rates import Machine
from qmix.plan.file import read_plan
from qmix.plan.target import PlanTarget as PlanSubject
from qmix.planner.planned import plan_on
from qmix.store.journal import Entry, Journal, Subject, encoded
from qmix.store.layout import StoreLayout, parse_precisions
from qmix.store.manifest import MANIFEST
from qmix.store.opened import Store, open_store
from qmix.store.profile import Profile, check_profile, read_profile
from qmix.store.writer import JOURNAL
from qmix.text.prompt import PromptEncoder
from qmix.text.tokenizer import load_tokenizer
from qmix.units import parse_bytes, parse_flops, parse_rate

TINY = Path(__file__).parent.parent / "qmix" / "models" / "tiny"
TASKS = Path(__file__).parent / "evaluation"
BATCH = {"input": "a" * 64, "model": "m", "options": {"temperature": 0}}


@dataclass(frozen=True)
class Parser:
    """`weight` is how many inputs it gets beside the others; `form` says how its documents are changed. An input may
    take `seconds`: more than 5 only where a library reads files of its own first."""

    name: str
    form: str
    documents: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    weight: float = 1.0
    seconds: float = 5.0


class Room:
    """A directory with a checkpoint, a release and a store of it, for parsers to read one changed file of."""

    def __init__(self, place: Path) -> None:
        self.place = place
        weights = random_weights(TINY_CONFIG)
        self.checkpoint = write_checkpoint(place / "checkpoint", weights, TINY_CONFIG, 2, TINY)
        self.release = write_mistral(place / "release", weights, TINY_CONFIG)
        self.layout: StoreLayout = make_store(self.checkpoint, place / "made").layout
        shutil.copy(TINY / "generation_config.json", place / "made")
        self.store: Store = open_store(place / "made")

    def changed(self, source: Path, file: str, read: Callable[[Path], object]) -> Parser:
        """Read a directory like `source` in which one file is another."""
        copy = self.place / f"{source.name}-{file}"
        shutil.copytree(source, copy)
        document = (copy / file).read_bytes()

        def parse(data: bytes) -> object:
            (copy / file).write_bytes(data)
            return read(copy)

        form = "text" if file.endswith(".jinja") else "json"
        return Parser(f"{file} of a {source.name}", form, (document,), parse)

    def file(self, name: str, form: str, documents: tuple[bytes, ...], read: Callable[[Path], object]) -> Parser:
        """Read one file that lies by itself."""
        path = self.place / name

        def parse(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return Parser(name, form, documents, parse)


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def all_parsers(place: Path) -> list[Parser]:
    room = Room(place)
    return [
        *of_checkpoints(room),
        *of_stores(room),
        *of_plans(room),
        *of_batches(room),
        *of_chats(room),
        *of_words(room),
    ]


def of_checkpoints(room: Room) -> list[Parser]:
    tensors = {name: weight for name, weight in random_weights(TINY_CONFIG).items() if "layers.0.input" in name}
    return [
        room.changed(room.checkpoint, "config.json", lambda path: read_config(LocalSource(path))),
        room.changed(room.release, "params.json", lambda path: read_config(LocalSource(path))),
        room.changed(room.checkpoint, "model.safetensors.index.json", lambda path: open_checkpoint(LocalSource(path))),
        room.file("header.safetensors", "safetensors", (save(tensors, {"format": "pt"}),), read_header),
        replace(room.changed(room.checkpoint, "tokenizer.json", load_tokenizer), weight=0.02),
        replace(room.changed(room.checkpoint, "tokenizer_config.json", load_tokenizer), weight=0.02),
        room.file("generation_config.json", "json", generation_configs(), generation),
    ]


def generation_configs() -> tuple[bytes, ...]:
    ranged = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}
    listed = {"eos_token_id": [2, 3], "stop_strings": ["a"], "bad_words_ids": [[4, 5]], "sequence_bias": [[[6], -1.5]]}
    return (TINY / "generation_config.json").read_bytes(), dumped(ranged), dumped(listed)


def generation(path: Path) -> object:
    return parse_generation_config(path.read_bytes(), TINY_CONFIG["vocab_size"], path)


def of_stores(room: Room) -> list[Parser]:
    entries = [
        Entry(subject=Subject(2, (("nf4",) * 4,) * 2, "bf16")),
        Entry(checkpoint="abc"),
        Entry(weight="lm_head.weight", read="0123456789abcdef"),
        Entry(unit="0.1", xxh3="0123456789abcdef"),
    ]
    lines = b"".join(map(encoded, entries))
    return [
        room.changed(room.store.directory, MANIFEST, open_store),
        room.changed(room.store.directory, "config.json", open_store),
        room.file(JOURNAL, "lines", (lines, b""), lambda path: Journal(path, lambda: None).close()),
    ]


def of_plans(room: Room) -> list[Parser]:
    python = mock.patch("qmix.plan.here.interpreter_memory", return_value=10**8)
    with python:
        subject = PlanSubject("org/small", room.layout, "abc")
        plans = [plan_on(subject, Machine(2**32, gpus), 100).to_json() for gpus in ((), (2**30,))]
    use, errors = ((0.5,) * 4,) * 2, ((1.0, 2.0, 3.0, 4.0),) * 2
    profile = Profile("org/small", "abc", use, {"nf4": errors, "int8": errors}, (("nf4",) * 4,) * 2, "lru")

    def plan(path: Path) -> object:
        with python, mock.patch("qmix.plan.file.found_gpus", return_value=(2**34,)):
            return read_plan(path).plan_of(room.layout, "abc")

    def checked(path: Path) -> object:
        found = read_profile(path)
        check_profile(found, path, room.layout.geometry, "abc")
        return found.spec("auto", 10**9, room.layout.geometry, "bf16")

    rates = {"schema": "qmix-machine-1", "machine": machine_profile._identity(), "rates": {"disk_read": 2e9}}
    return [
        room.file("plan.json", "json", tuple(map(dumped, plans)), plan),
        room.file("profile.json", "json", (dumped(profile.to_json()),), checked),
        room.file("machine.json", "json", (dumped(rates),), machine_profile.measured_rates),
        _interpreter_cache(room),
    ]


def _interpreter_cache(room: Room) -> Parser:
    """The cache of what Python takes, which is measured anew (here: said to be a byte) where it cannot be read."""
    cache = room.place / "interpreter"
    measuring = mock.patch("qmix.machine.found.subprocess.run", return_value=CompletedProcess((), 0, "1\n", ""))

    def read(path: Path) -> object:
        with measuring:
            found = machine.interpreter_memory(cache)
        if type(found) is not int or not 0 < found < 2**63:
            raise AssertionError(f"Python takes {found!r} bytes")
        return found

    with measuring:
        machine.interpreter_memory(cache)
    (path,) = cache.glob("interpreter-*.json")
    return replace(
        room.file(str(path.relative_to(room.place)), "json", (path.read_bytes(),), read), name="interpreter cache"
    )


def of_batches(room: Room) -> list[Parser]:
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "seed": 1, "max_tokens": 5, "stop": ["a"], "min_p": 0.1}
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    short = [{"id": "a", "prompt": "x"} | options, {"id": 7, "messages": messages, "logprobs": True, "top_logprobs": 2}]
    body = {"model": "m", "messages": messages, "n": 1, "stream": False, "max_completion_tokens": 3, "user": "u"}
    openai = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2]} | options},
    ]
    answers = [{"id": "1", "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}]
    answers += [{"id": "2", "custom_id": "b", "response": None, "error": {"code": "x", "message": "y"}}]

    def requests(data: bytes) -> None:
        found = Requests(io.BytesIO(data))
        if found.problems:
            raise UsageError(found.problems[0])
        for entry in found.entries:
            found.line(entry)

    def lines(items: list[dict[str, Any]]) -> bytes:
        return b"".join(dumped(item) + b"\n" for item in items)

    manifest = room.place / "manifest.jsonl"
    manifest.write_bytes(lines(answers))
    with FileAnswers(room.place / "first.jsonl") as first:
        first.begin(BATCH, {"created": 4, "seed": 1}, 2)
        begun = first.manifest.read_bytes()

    def outputs(path: Path) -> None:
        with FileAnswers(path):
            pass

    def resumed(path: Path) -> None:
        with FileAnswers(manifest) as found:
            found.begin(BATCH, {"created": 4, "seed": 1}, 2)

    key = {"key": "0123456789abcdef" * 2}
    results = lines([key | {"result": [-1.5, True]}, {"key": "f" * 32, "result": [3, 4, 5]}])

    def kept(path: Path) -> None:
        with Results(path.parent, "m"):
            pass

    (room.place / "eval").mkdir()
    return [
        Parser("batch lines, short", "lines", (lines(short),), requests),
        Parser("batch lines, OpenAI", "lines", (lines(openai),), requests),
        room.file("answers.jsonl", "lines", (lines(answers),), outputs),
        room.file("manifest.jsonl.qmix.json", "json", (begun,), resumed),
        room.file(f"eval/{REQUESTS}", "lines", (results,), kept),
        *(_tasks(room, name) for name in ("help_choice", "help_words")),
    ]


def _tasks(room: Room, name: str) -> Parser:
    """A task's YAML in a directory of data; its data lies beside it. Slow: the harness reads the data each time."""
    data = room.place / name
    shutil.copytree(TASKS, data)
    for path in data.glob("*.yaml"):
        path.unlink()

    def parse(content: bytes) -> object:
        (data / f"{name}.yaml").write_bytes(content)
        own_tasks(data)
        return load_tasks([name], data, None)

    # where a name is not found, the harness's index of 10,000 tasks is read before that is said
    return Parser(f"{name}.yaml", "text", ((TASKS / f"{name}.yaml").read_bytes(),), parse, 0.005, 60)


def of_chats(room: Room) -> list[Parser]:
    tokenizer = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    plan = SimpleNamespace(context=256, ram=2**30, expert_bytes={"nf4": 1}, slots=4, num_records=8)
    pool = SimpleNamespace(counters=SimpleNamespace(hit_rate=0.5, bytes_read=0))
    encoder = PromptEncoder(tokenizer, 256, 512)
    runner: Any = SimpleNamespace(tokenizer=tokenizer, encoder=encoder, plan=plan, store=room.store, pool=pool, held=[])
    runner.load_cache = runner.save_cache = lambda path: 0
    turn = {"user": "a", "answer": "b", "kept": 0, "opening": [1, 3], "answer_ids": [4, 5]}
    saved = {
        "schema": record.SCHEMA,
        "model": {"name": "m", "parts": room.store.parts},
        "system": "be brief",
        "settings": {"temperature": 0.7, "stop": ["a"], "seed": 1},
        "forgotten": 0,
        "turns": [turn, turn | {"kept": 2}],
    }

    def loaded(path: Path) -> object:
        return record.load(Session(runner, {}), path)

    def command(data: bytes) -> object:
        """Run a line as a terminal gives it: bytes that are not UTF-8 come as surrogates."""
        line = "/" + data.decode("utf-8", errors="surrogateescape").partition("\n")[0].strip().lstrip("/")
        if line.lower().startswith("/save"):  # writes where it is told to
            return None
        session = Session(runner, {})
        session.conversation.turns = []
        return slash.run(line, session)

    def template(data: bytes) -> object:
        before, tokenizer.chat_template = tokenizer.chat_template, data.decode("utf-8", errors="replace")
        try:
            return format_of(tokenizer).whole("be brief", (), "How do I print?")
        finally:
            tokenizer.chat_template = before

    commands = (
        b"/set temperature 0.7", b"/set stop a\\n", b"/set top-k 4", b"/set", b"/system be brief", b"/load x.json",
        b'/read "a b" what?', b"/stats", b"/help", b"/undo", b"/regen", b"/model",
    )  # fmt: skip
    return [
        room.file("chat.json", "json", (dumped(saved),), loaded),
        Parser("slash commands", "text", commands, command),
        replace(Parser("chat template", "text", ((TINY / "chat_template.jinja").read_bytes(),), template), weight=0.2),
    ]


def of_words(room: Room) -> list[Parser]:
    """Return the parsers of words typed on a command line."""

    def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
        return lambda data: read(data.decode("utf-8", errors="surrogateescape"))

    geometry = room.layout.geometry
    return [
        Parser("sizes", "text", (b"12GiB", b"500 MB", b"1.5g", b"20000000000"), text(parse_bytes)),
        Parser("rates", "text", (b"25GB/s", b"3.2 GB", b"900G"), text(parse_rate)),
        Parser("FLOP rates", "text", (b"80TFLOP/s", b"800 GFLOPS", b"80T"), text(parse_flops)),
        Parser(
            "precisions", "text", (b"nf4,0.*=int8,*.3=half", b"fp4"), text(partial(parse_precisions, geometry=geometry))
        ),
        Parser("hub ids", "text", (b"mistralai/Mixtral-8x7B-v0.1@main", b"org/name"), text(parse_hub_id)),
    ]
