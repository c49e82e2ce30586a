"""Whatever is wrong is said in one line that names it and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, write_checkpoint
from command import real

from qmix.checkpoint.naming import expected_weights
from qmix.checkpoint.safetensors_header import build_header
from qmix.geometry import Geometry
from qmix.store.use import LAST_USE

SHARD = "model-00002-of-00003.safetensors"
EXPERTS = "experts-00003.safetensors"


@dataclass(frozen=True)
class Wrong:
    """A command, and the last line of what it answers."""

    argv: str
    status: int
    told: str
    stdin: bytes = b""


def edited(source: Path, target: Path, file: str, edit: Callable[[bytes], bytes | None]) -> Path:
    """A directory like `source` but for one file; None deletes it."""
    shutil.copytree(source, target, copy_function=os.link)
    content = edit((target / file).read_bytes())
    (target / file).unlink()
    if content is not None:
        (target / file).write_bytes(content)
    return target


def flipped(position: int) -> Callable[[bytes], bytes]:
    """One bit of the byte at `position` (from the end if below zero) turned."""

    def flip(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[position] ^= 1
        return bytes(damaged)

    return flip


def replaced(**changes: object) -> Callable[[bytes], bytes]:
    """JSON with other values."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


@pytest.fixture(scope="module")
def stage(tmp_path_factory, commands, first_use) -> Path:
    """A directory full of things that are wrong, beside a model, other, store and tiny that are right."""
    stage = tmp_path_factory.mktemp("stage")
    model = make_checkpoint(stage / "model", shards=3)
    make_checkpoint(stage / "other", seed=1)
    edited(model, stage / "cut", SHARD, lambda content: content[:-1000])
    edited(model, stage / "empty", SHARD, lambda content: b"")
    edited(model, stage / "length", SHARD, flipped(4))
    edited(model, stage / "header", SHARD, flipped(8))
    edited(model, stage / "missing", SHARD, lambda content: None)
    edited(model, stage / "index", "model.safetensors.index.json", lambda content: content[:100])
    edited(model, stage / "llama", "config.json", replaced(model_type="llama"))
    edited(model, stage / "keyless", "config.json", lambda content: b'{"model_type": "mixtral"}')
    edited(model, stage / "wider", "config.json", replaced(intermediate_size=192))
    edited(model, stage / "noconfig", "config.json", lambda content: None)
    edited(model, stage / "textconfig", "config.json", lambda content: b"a config")
    for name, key in (("nan", "layers.1.block_sparse_moe.experts.2.w3"), ("inf", "layers.0.self_attn.q_proj")):
        weights = random_weights(TINY_CONFIG)
        weights[f"model.{key}.weight"][5, 7] = float(name)
        write_checkpoint(stage / name, weights, TINY_CONFIG)
    for source, target in (("model", "store"), ("other", "otherstore")):
        assert commands("quantize", source, target, cwd=stage, XDG_CACHE_HOME=str(first_use.cache)).status == 0
    tiny = first_use.store
    edited(tiny, stage / "tinystore", "qmix.json", lambda content: content)
    edited(tiny, stage / "badexpert", EXPERTS, flipped(-5000))
    edited(tiny, stage / "baddense", "dense.safetensors", flipped(-5000))
    edited(tiny, stage / "badheader", EXPERTS, flipped(100))
    edited(tiny, stage / "cutexperts", EXPERTS, lambda content: content[:-4096])
    edited(tiny, stage / "noexperts", EXPERTS, lambda content: None)
    edited(tiny, stage / "cutmanifest", "qmix.json", lambda content: content[:1000])
    edited(tiny, stage / "oddmanifest", "qmix.json", replaced(precisions=[["q4"]]))
    edited(tiny, stage / "version3", "qmix.json", replaced(format_version=3))
    edited(tiny, stage / "half.partial", "qmix.json", lambda content: None)
    edited(tiny, stage / "notokens", "tokenizer.json", lambda content: None)
    edited(tiny, stage / "badtokens", "tokenizer.json", lambda content: content[:1000])
    foreign = (stage / "model" / "config.json").read_bytes()
    edited(tiny, stage / "foreignconfig", "config.json", lambda content: foreign)
    other = (stage / "otherstore" / "experts-00000.safetensors").read_bytes()
    edited(stage / "store", stage / "mixed", "experts-00000.safetensors", lambda content: other)
    for tokens in tiny.glob("tokenizer*"):
        os.link(tokens, stage / "mixed" / tokens.name)
    (stage / "file").write_text("no directory")
    (stage / "dangling").symlink_to("nowhere")
    return stage


def transcripts() -> list[Wrong]:
    """The table in bad_input.txt."""
    lines = Path(__file__).with_name("bad_input.txt").read_text(encoding="utf-8").splitlines()
    commands = [(number, line) for number, line in enumerate(lines) if line.startswith("$ qmix ")]
    answers = [lines[number + 1].split(" ", 1) for number, _ in commands]
    return [
        Wrong(line.removeprefix("$ qmix "), int(status), told)
        for (_, line), (status, told) in zip(commands, answers, strict=True)
    ]


UNPRINTABLE = [
    Wrong("generate ' \n '", 2, "qmix: PROMPT: is empty; give some text to continue"),
    Wrong("generate \udcff", 2, "qmix: PROMPT: not UTF-8 text (byte 0)"),
    Wrong("generate -", 2, "qmix: stdin: is empty; give some text to continue", b"\n \t\n"),
    Wrong("generate", 2, "qmix: stdin: not UTF-8 text (byte 1)", "déjà vu".encode("latin-1")),
    Wrong(
        "generate -m tiny",
        2,
        "qmix: the prompt is 2202 tokens, too long for a context of 2048, the model's longest; shorten it",
        b"word " * 1100 + b"x " * 1100,
    ),
    Wrong(
        "generate -m tiny --context 1000",
        2,
        "qmix: the prompt is 15000 bytes, too long for a context of 1000; shorten it, or give a larger --context",
        b"word " * 3000,
    ),
    Wrong(
        "generate -m tiny",
        2,
        "qmix: stdin: longer than 4194304 bytes, more than any context holds; shorten it",
        b"\0" * (2**22 + 1),
    ),
]


def listing(*directories: Path) -> set[Path]:
    """All that lies there under a final name, but for what was measured of Python."""
    found = {path for directory in directories for path in directory.rglob("*") if path.name != LAST_USE}
    found = {path for path in found if not any(part.endswith(".partial") for part in path.parts)}
    return {path for path in found if not path.name.startswith("interpreter-")}


@pytest.mark.parametrize("wrong", [*transcripts(), *UNPRINTABLE], ids=lambda wrong: wrong.argv)
def test_one_line_names_what_is_wrong_and_what_to_do(qmix, first_use, stage, wrong):
    before = listing(stage, first_use.cache)
    done = qmix(*shlex.split(wrong.argv), stdin=wrong.stdin, cwd=stage)
    told = wrong.told.format(stage=stage, hub=qmix.hub_cache)
    assert (done.status, done.out) == (wrong.status, "")
    if told.startswith("Error: "):
        assert done.lines[0].startswith("Usage: qmix ")
        assert done.lines[-1] == told
    else:
        progress = [line for line in done.lines if line.startswith("quantizing ")]
        notice = [line for line in done.lines if line.startswith("no model given: ")]
        assert done.err == "".join(f"{line}\n" for line in (*notice, *progress, told))
    assert listing(stage, first_use.cache) == before
    shutil.rmtree(stage / "new.partial", ignore_errors=True)


@pytest.mark.parametrize(
    "argv", ["generate x -m badexpert", "quantize nan new", "plan nowhere", "generate x --top-p 0"], ids=str
)
def test_the_command_itself_says_the_same_as_its_fork(qmix, stage, argv):
    expected = qmix(*argv.split(), cwd=stage)
    shutil.rmtree(stage / "new.partial", ignore_errors=True)
    done = real(*argv.split(), cwd=stage)
    shutil.rmtree(stage / "new.partial", ignore_errors=True)
    assert expected.status > 0
    assert (done.status, done.out, done.lines[-1]) == (expected.status, "", expected.lines[-1])
    assert "Traceback" not in done.err


def test_a_budget_that_is_too_small_is_refused_before_anything_is_quantized(qmix, first_use, stage):
    before = listing(first_use.cache)
    done = qmix("generate", "x", "-m", "other", "--ram", "1MB", cwd=stage)
    assert (done.status, done.out) == (3, "")
    assert re.fullmatch(r"qmix: does not fit 1 MB of RAM: needs .* --ram \d+MB\n", done.err), done.err
    assert listing(first_use.cache) == before


def test_space_is_checked_before_the_first_byte_is_written(qmix, tmp_path):
    """The store of 53 TB of weights, in files that are one hole each."""
    if shutil.disk_usage(tmp_path).free > 10e12:
        pytest.skip("this disk would hold it")
    config = TINY_CONFIG | {
        "hidden_size": 2**18,
        "intermediate_size": 2**19,
        "num_hidden_layers": 8,
        "num_local_experts": 8,
    }
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    expected = dict(expected_weights(Geometry.from_config(config)))
    for layer in range(8):
        placed, position = [], 0
        for name, shape in expected.items():
            if f"layers.{layer}." in name or (layer == 0 and "layers" not in name):
                placed.append((name, "BF16", shape, position))
                position += 2 * math.prod(shape)
        header, _ = build_header(placed, position, 8)
        shard = model / f"model-{layer + 1:05d}-of-00008.safetensors"
        shard.write_bytes(header)
        os.truncate(shard, len(header) + position)
    done = qmix("quantize", "model", "new", cwd=tmp_path)
    told = (
        r"qmix: new: needs 14 TB more on its disk, [\d.]+ [kMGT]?B are free; free some space or choose another disk\n"
    )
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(told, done.err), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_target_that_cannot_be_written_is_named(qmix, stage, tmp_path):
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    done = qmix("quantize", stage / "model", "new", cwd=tmp_path)
    assert (done.status, done.out, done.err) == (1, "", f"qmix: {tmp_path}/new.partial: Permission denied\n")


def test_what_another_checkpoint_began_is_compared_before_it_is_gone_on_with(qmix, stage):
    """All that was written of `nan` before its bad weight, `model` has too; the store is that of `model` alone."""
    assert qmix("quantize", "nan", "begun", cwd=stage).status == 1
    assert qmix("quantize", "model", "begun", cwd=stage).status == 0
    assert qmix("quantize", "model", "fresh", cwd=stage).status == 0
    begun, fresh = (
        {path.name: path.read_bytes() for path in (stage / name).iterdir() if path.suffix == ".safetensors"}
        for name in ("begun", "fresh")
    )
    assert begun == fresh
    for name in ("begun", "fresh"):
        shutil.rmtree(stage / name)


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (
            "ZeroDivisionError('by\\nnought')",
            1,
            "a bug in qmix: ZeroDivisionError: by nought; QMIX_DEBUG=1 shows the traceback",
        ),
        ("OSError(28, 'No space left on device', '/full')", 1, "/full: No space left on device"),
        ("MemoryError()", 1, "out of memory; give a smaller --ram or --context"),
        (
            "type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory. Tried to allocate 2 GiB')",
            1,
            "out of memory on a GPU; give a smaller --gpu or --context, or close other programs that use it",
        ),
        ("KeyboardInterrupt()", 130, "interrupted"),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(raised, status, told):
    script = f"import cli\ndef run(): raise {raised}\ncli.main(run)"
    ran = partial(subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, check=False)
    done = ran()
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"qmix: {told}\n")
    assert ("Traceback" in ran(env=os.environ | {"QMIX_DEBUG": "1"}).stderr) == ("a bug" in told or "GPU" in told)
