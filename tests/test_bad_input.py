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
from qmix.geometry import Geometry
from qmix.safetensors_header import build_header

SHARD = "model-00002-of-00003.safetensors"
EXPERTS = "experts-00003.safetensors"


@dataclass(frozen=True)
class Wrong:
    """A command, and all that it answers: `told` follows `qmix: `, or is the last line of click's usage error."""

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
    (tiny,) = (path for path in (first_use.cache / "qmix").iterdir() if path.is_dir())
    edited(tiny, stage / "tinystore", "qmix.json", lambda content: content)
    edited(tiny, stage / "badexpert", EXPERTS, flipped(-5000))
    edited(tiny, stage / "baddense", "dense.safetensors", flipped(-5000))
    edited(tiny, stage / "badheader", EXPERTS, flipped(100))
    edited(tiny, stage / "cutexperts", EXPERTS, lambda content: content[:-4096])
    edited(tiny, stage / "noexperts", EXPERTS, lambda content: None)
    edited(tiny, stage / "cutmanifest", "qmix.json", lambda content: content[:1000])
    edited(tiny, stage / "oddmanifest", "qmix.json", replaced(precisions=[["q4"]]))
    edited(tiny, stage / "version2", "qmix.json", replaced(format_version=2))
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


NOT_FINITE = "holds NaN or infinite weights; the checkpoint is damaged, fetch it again"
NO_SIZE = "is not a size; write it like 12GiB, 500MB or 20000000000"
CHOICES = "choose one of nf4, fp4, int8, half"
NEITHER = "neither config.json nor params.json is there; is it a Mixtral checkpoint?"
UNKNOWN = "no such directory, nor a hub id (org/name), nor one of tiny"
EXISTS = "exists and is not a qmix store; choose another name"

OPTIONS = [
    Wrong("generate one two -m tiny", 2, "Error: Got unexpected extra argument (two)"),
    Wrong("frobnicate", 2, "Error: No such command 'frobnicate'."),
    Wrong("quantize model", 2, "Error: Missing argument 'STORE'."),
    Wrong("generate x -m tiny --precision q4", 2, f"--precision: 'q4' is not a precision; {CHOICES}"),
    Wrong("generate x -m tiny --precision=", 2, f"--precision: '' is not a precision; {CHOICES}"),
    Wrong("plan tinystore --precision q4", 2, f"--precision: 'q4' is not a precision; {CHOICES}"),
    Wrong(
        "generate x -m tiny --precision nf4,9.*=int8",
        2,
        "--precision: '9.*=int8' names no expert; write LAYER.EXPERT=PRECISION, for example 0.*=int8",
    ),
    Wrong(
        "generate x -m tinystore --precision int8",
        2,
        "--precision int8: the store tinystore has another; leave it out, or quantize its checkpoint",
    ),
    Wrong(
        "generate x -m tinystore --dtype fp16",
        2,
        "--dtype fp16: the store tinystore has bf16; leave it out, or quantize its checkpoint",
    ),
    Wrong("generate x --dtype fp8", 2, "Error: Invalid value for '--dtype': 'fp8' is not one of 'bf16', 'fp16'."),
    Wrong(
        "quantize model new --dtype fp8", 2, "Error: Invalid value for '--dtype': 'fp8' is not one of 'bf16', 'fp16'."
    ),
    Wrong(
        "generate x --attn foo",
        2,
        "Error: Invalid value for '--attn': 'foo' is not one of 'eager', 'sdpa', 'flash_attention_2'.",
    ),
    Wrong(
        "generate x -m model --attn flash_attention_2",
        2,
        "--attn flash_attention_2: the package flash-attn is not installed; use sdpa, or install it",
    ),
    Wrong("generate x -m model --ram lots", 2, f"Error: Invalid value for '--ram': 'lots' {NO_SIZE}"),
    Wrong("generate x -m model --ram -1GiB", 2, f"Error: Invalid value for '--ram': '-1GiB' {NO_SIZE}"),
    Wrong("generate x -m model --ram=", 2, f"Error: Invalid value for '--ram': '' {NO_SIZE}"),
    Wrong("plan model --ram 0", 2, "Error: Invalid value for '--ram': '0' is not a size above zero"),
    Wrong("generate x -m model --context 0", 2, "Error: Invalid value for '--context': 0 is not in the range x>=1."),
    Wrong("plan tiny --context 2049", 2, "--context 2049: must be 1 to 2048, the model's longest"),
    Wrong("generate x -m tiny --context 2049", 2, "--context 2049: must be 1 to 2048, the model's longest"),
    Wrong("generate x -m tiny --max-new-tokens 0", 2, "--max-new-tokens 0: must be at least 1"),
    Wrong("generate x --temperature -0.1", 2, "--temperature -0.1: must be 0 (greedy), or 0.000001 to 100"),
    Wrong("generate x --temperature nan", 2, "--temperature nan: must be 0 (greedy), or 0.000001 to 100"),
    Wrong("generate x --temperature 1e-40", 2, "--temperature 1e-40: must be 0 (greedy), or 0.000001 to 100"),
    Wrong("generate x --top-p 0", 2, "--top-p 0.0: must be above 0 and at most 1"),
    Wrong("generate x --top-k -1", 2, "--top-k -1: must be 0 (off) or more"),
    Wrong("generate x --top-k few", 2, "Error: Invalid value for '--top-k': 'few' is not a valid integer."),
    Wrong("generate x --min-p 1.5", 2, "--min-p 1.5: must be 0 to 1"),
    Wrong("generate x --repetition-penalty 1e-40", 2, "--repetition-penalty 1e-40: must be 0.01 to 100"),
    Wrong("generate x --seed -1", 2, "--seed -1: must be 0 to 2^63 - 1"),
    Wrong("generate x --seed 9223372036854775808", 2, "--seed 9223372036854775808: must be 0 to 2^63 - 1"),
    Wrong("generate x --stop=", 2, "--stop '': must be a text that is not empty"),
]
PROMPTS = [
    Wrong("generate ''", 2, "PROMPT: is empty; give some text to continue"),
    Wrong("generate ' \n '", 2, "PROMPT: is empty; give some text to continue"),
    Wrong("generate \udcff", 2, "PROMPT: not UTF-8 text (byte 0)"),
    Wrong("generate", 2, "stdin: is empty; give some text to continue"),
    Wrong("generate -", 2, "stdin: is empty; give some text to continue", b"\n \t\n"),
    Wrong("generate", 2, "stdin: not UTF-8 text (byte 1)", "déjà vu".encode("latin-1")),
    Wrong(
        "generate -m tiny",
        2,
        "the prompt is 3002 tokens, too long for a context of 2048; shorten it, or give a larger --context",
        b"word " * 3000,
    ),
    Wrong(
        "generate 'to be or not to be' -m tiny --context 4",
        2,
        "the prompt is 7 tokens, too long for a context of 4; shorten it, or give a larger --context",
    ),
]
MODELS = [
    Wrong("generate x -m nowhere", 2, f"nowhere: {UNKNOWN}"),
    Wrong("generate x -m file", 2, f"file: {UNKNOWN}"),
    Wrong("generate x -m dangling", 2, f"dangling: {UNKNOWN}"),
    Wrong("generate x -m ''", 2, "the model's name is empty; leave it out for the embedded one"),
    Wrong("plan ''", 2, "the model's name is empty; leave it out for the embedded one"),
    Wrong(
        "generate x -m org/name",
        1,
        "org/name: not in the cache ({hub}), and HF_HUB_OFFLINE is set; unset it to download",
    ),
    Wrong("generate x -m .", 1, f".: {NEITHER}"),
    Wrong("quantize noconfig new", 1, f"noconfig: {NEITHER}"),
    Wrong("quantize llama new", 1, "llama/config.json: model_type is 'llama'; qmix runs Mixtral models only"),
    Wrong("quantize keyless new", 1, "keyless/config.json: the key 'hidden_size' is missing"),
    Wrong(
        "quantize textconfig new",
        1,
        "textconfig/config.json: not valid JSON (Expecting value: line 1 column 1 (char 0))",
    ),
    Wrong(
        "quantize wider new",
        1,
        "wider: tensor 'model.layers.0.block_sparse_moe.experts.0.w1.weight' has shape [128, 64], "
        "its config asks for [192, 64]",
    ),
    Wrong("plan cut", 1, f"cut/{SHARD}: cut short: 140600 bytes, its header says 141600; fetch it again"),
    Wrong("quantize cut new", 1, f"cut/{SHARD}: cut short: 140600 bytes, its header says 141600; fetch it again"),
    Wrong("quantize empty new", 1, f"empty/{SHARD}: not a safetensors file, or cut short; fetch it again"),
    Wrong("quantize length new", 1, f"length/{SHARD}: not a safetensors file, or cut short; fetch it again"),
    Wrong("generate x -m header", 1, f"header/{SHARD}: its header is damaged; fetch it again"),
    Wrong(
        "quantize missing new",
        1,
        f"missing: the shard {SHARD} named by model.safetensors.index.json is missing; fetch it",
    ),
    Wrong(
        "quantize index new",
        1,
        "index/model.safetensors.index.json: not valid JSON (Unterminated string starting at: "
        "line 1 column 82 (char 81))",
    ),
    Wrong(
        "quantize nan new",
        1,
        f"nan/model.safetensors: tensor 'model.layers.1.block_sparse_moe.experts.2.w3.weight' {NOT_FINITE}",
    ),
    Wrong(
        "generate x -m inf",
        1,
        f"inf/model.safetensors: tensor 'model.layers.0.self_attn.q_proj.weight' {NOT_FINITE}",
    ),
]
STORES = [
    Wrong(
        "generate x -m badexpert",
        1,
        f"badexpert/{EXPERTS}: the record of expert 7 is damaged; quantize the model again",
    ),
    Wrong(
        "generate x -m baddense",
        1,
        "baddense/dense.safetensors: the tensor lm_head.weight is damaged; quantize the model again",
    ),
    Wrong(
        "generate x -m badheader",
        1,
        f"badheader/{EXPERTS}: damaged, or of another model than this store; quantize the model again",
    ),
    Wrong(
        "generate x -m cutexperts",
        1,
        f"cutexperts/{EXPERTS}: 1052672 bytes, 1056768 expected; quantize the model again",
    ),
    Wrong(
        "generate x -m noexperts",
        1,
        f"noexperts/{EXPERTS}: No such file or directory; quantize the model again",
    ),
    Wrong(
        "generate x -m cutmanifest",
        1,
        "cutmanifest/qmix.json: damaged, not valid JSON; quantize the model again",
    ),
    Wrong("generate x -m oddmanifest", 1, "oddmanifest/qmix.json: damaged; quantize the model again"),
    Wrong(
        "generate x -m version2",
        1,
        "version2/qmix.json: format version 2, this qmix reads 1; quantize the model again",
    ),
    Wrong(
        "plan version2",
        1,
        "version2/qmix.json: format version 2, this qmix reads 1; quantize the model again",
    ),
    Wrong("generate x -m half", 1, "half: not finished yet; run the same `qmix quantize` again and it goes on"),
    Wrong("plan half", 1, "half: not finished yet; run the same `qmix quantize` again and it goes on"),
    Wrong(
        "generate x -m notokens",
        1,
        "notokens: has no tokenizer (tokenizer.json or tokenizer.model); copy the model's own there",
    ),
    Wrong(
        "generate x -m badtokens",
        1,
        "badtokens: its tokenizer cannot be loaded (Expecting ':' delimiter: line 53 column 11 (char 1000))",
    ),
    Wrong(
        "generate x -m foreignconfig",
        1,
        "foreignconfig/qmix.json: belongs to another model than foreignconfig/config.json; quantize the model again",
    ),
    Wrong(
        "generate x -m mixed",
        1,
        "mixed/experts-00000.safetensors: the record of expert 0 is damaged; quantize the model again",
    ),
]
TARGETS = [
    Wrong("quantize other store", 1, "store: is the store of another model (model); choose another name"),
    Wrong(
        "quantize model store --precision int8",
        1,
        "store: is a store of this model in another precision; choose another name",
    ),
    Wrong(
        "quantize model version2",
        1,
        "version2/qmix.json: format version 2, this qmix reads 1; quantize the model again",
    ),
    Wrong("quantize model file", 1, f"file: {EXISTS}"),
    Wrong("quantize model other", 1, f"other: {EXISTS}"),
    Wrong("quantize model dangling", 1, f"dangling: {EXISTS}"),
    Wrong("quantize model ''", 1, f".: {EXISTS}"),
    Wrong("quantize model / --evict", 1, f"/: {EXISTS}"),
    Wrong("quantize model file/new", 1, "{stage}/file/new.partial: Not a directory"),
    Wrong("quantize store new", 2, "store: is a store already; name the checkpoint that it was made from"),
]


def listing(*directories: Path) -> set[Path]:
    """All that lies there under a final name."""
    found = {path for directory in directories for path in directory.rglob("*")}
    return {path for path in found if not any(part.endswith(".partial") for part in path.parts)}


@pytest.mark.parametrize("wrong", [*OPTIONS, *PROMPTS, *MODELS, *STORES, *TARGETS], ids=lambda wrong: wrong.argv)
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
        notice = [line for line in done.lines if line.startswith("no model named: ")]
        assert done.err == "".join(f"{line}\n" for line in (*notice, *progress, f"qmix: {told}"))
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


@pytest.mark.xfail(reason="qmix.load does not pass prepare_store its check yet", strict=True)
def test_a_budget_that_is_too_small_is_refused_before_anything_is_quantized(qmix, first_use, stage):
    before = listing(first_use.cache)
    done = qmix("generate", "x", "-m", "other", "--ram", "1MB", cwd=stage)
    assert (done.status, done.out) == (3, "")
    assert re.fullmatch(r"qmix: does not fit 1 MB of RAM: needs .* --ram \d+MiB\n", done.err), done.err
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
    expected = expected_weights(Geometry.from_config(config))
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_that_cannot_be_written_is_named(qmix, stage, tmp_path):
    tmp_path.chmod(0o555)
    done = qmix("quantize", stage / "model", "new", cwd=tmp_path)
    assert (done.status, done.out, done.err) == (1, "", f"qmix: {tmp_path}/new.partial: Permission denied\n")


def test_what_another_checkpoint_began_is_not_gone_on_with(qmix, stage):
    assert qmix("quantize", "nan", "begun", cwd=stage).status == 1
    done = qmix("quantize", "model", "begun", cwd=stage)
    told = "begun with another checkpoint; delete that directory, or choose another name"
    assert (done.status, done.out, done.err) == (1, "", f"qmix: {stage}/begun.partial: {told}\n")


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (
            "ZeroDivisionError('by\\nnought')",
            1,
            "a bug in qmix: ZeroDivisionError: by nought; QMIX_DEBUG=1 shows where",
        ),
        ("OSError(28, 'No space left on device', '/full')", 1, "/full: No space left on device"),
        ("MemoryError()", 1, "out of memory; give a smaller --ram or --context"),
        ("KeyboardInterrupt()", 130, "interrupted"),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(raised, status, told):
    script = f"import cli\ndef run(): raise {raised}\ncli.main(run)"
    ran = partial(subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, check=False)
    done = ran()
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"qmix: {told}\n")
    assert ("Traceback" in ran(env=os.environ | {"QMIX_DEBUG": "1"}).stderr) == told.startswith("a bug")
