"""`qmix ls`, `show`, `rm`, `pull` and `verify`, as a shell and a terminal see them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pexpect
import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from command import COMMAND, LIMIT_SECONDS
from stores import interrupt_store, make_store

from qmix.store.use import LAST_USE, StoreUse


@pytest.fixture
def store(tiny_cache) -> Path:
    (found,) = tiny_cache.glob("tiny-*/")
    return found


def listed(commands, *argv) -> list[dict]:
    done = commands("ls", "--json", *argv)
    assert done.status == 0, done.err
    return json.loads(done.out)["stores"]


def test_ls_shows_model_precision_size_and_last_use(commands, store):
    (entry,) = listed(commands)
    files = sum(path.stat().st_blocks * 512 for path in store.iterdir())
    assert (entry["model"], entry["precision"], entry["dtype"], entry["state"]) == ("tiny", "nf4", "bf16", "whole")
    assert (entry["directory"], entry["bytes"], entry["in_use"]) == (str(store), files, False)
    assert store.name.endswith(entry["id"])
    table = commands("ls")
    assert re.search(rf"^tiny +nf4 +[\d.]+ MB +(just now|\d+ \w+ ago) +{entry['id']}$", table.out, re.MULTILINE)
    assert table.err.startswith("1 store, ")


def test_last_use_is_the_time_of_the_last_run_and_not_of_the_weights(commands, store):
    for path in store.iterdir():
        os.utime(path, (0, 0))
    (entry,) = listed(commands)
    assert entry["last_use"] == "1970-01-01T00:00:00+00:00"
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert commands("generate", "Hello", "-m", "tiny", "--max-new-tokens", "1").status == 0
    changed = {path.name for path in store.iterdir() if before[path.name] != path.stat().st_mtime_ns}
    assert changed == {LAST_USE}
    assert listed(commands)[0]["last_use"] > "2020"
    assert commands("verify", "tiny").status == 0


def test_an_unfinished_store_is_marked_and_removed(commands, tiny_cache, tiny):
    interrupt_store(tiny, tiny_cache / "half", "int8", 3)
    entry = next(entry for entry in listed(commands) if entry["state"] == "partial")
    assert (entry["model"], entry["precision"], entry["id"]) == ("tiny", "int8", "half")
    assert "int8, partial" in commands("ls").out
    refused = commands("show", "half")
    assert (refused.status, refused.out) == (1, "")
    assert "unfinished" in refused.err
    assert commands("rm", "half", "--yes").status == 0
    assert not (tiny_cache / "half.partial").exists()


def test_show_tells_what_is_known_without_reading_weights(commands, store):
    found = json.loads(commands("show", "tiny", "--json").out)
    assert found["experts"] == {"nf4": 48}
    assert found["chat_template"] is True
    assert found["profile"] is False
    assert found["geometry"]["num_layers"] == 6
    assert found["bytes_by_kind"]["dense"] == (store / "dense.safetensors").stat().st_size
    smallest = found["smallest_ram"]
    refused = commands("generate", "Hi", "-m", "tiny", "--ram", str(smallest - 1))
    assert refused.status == 3
    assert f"--ram {-(-smallest // 10**6)}MB" in refused.err
    table = commands("show", store.name[:12])
    assert f"least memory   --ram {-(-smallest // 10**6)}MB" in table.out
    assert "chat template  yes" in table.out


def test_names_that_are_no_store_or_several(commands, tiny_cache, store, tmp_path):
    missing = commands("show", "nothing")
    assert (missing.status, missing.out) == (2, "")
    assert missing.err == "qmix: nothing: not found: expected a store's directory or a name that `qmix ls` shows\n"
    shutil.copytree(store, tiny_cache / "tiny-other")
    several = commands("rm", "tiny", "--yes")
    assert several.status == 2
    assert "tiny: names 2 stores; give one of " in several.err
    assert store.is_dir()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "qmix.json").write_text("{}")
    assert commands("rm", tmp_path / "documents", "--yes").status == 2
    assert (tmp_path / "documents" / "qmix.json").exists()


def test_rm_removes_nothing_without_a_terminal_or_yes(commands, store):
    refused = commands("rm", "tiny")
    assert refused.status == 2
    assert refused.err == "qmix: rm: asks before it removes, and stdin is not a terminal; give --yes\n"
    assert store.is_dir()


@pytest.mark.parametrize(("answer", "there"), [("n", True), ("y", False)])
def test_rm_asks_on_a_terminal_with_the_bytes(commands, store, answer, there):
    terminal = pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], "rm", "tiny"], encoding="utf-8", timeout=LIMIT_SECONDS, dimensions=(24, 160)
    )
    terminal.expect(r"remove 1 store and free [\d.]+ MB\? \[y/N\]:")
    terminal.sendline(answer)
    terminal.expect("nothing removed" if there else "removed, [0-9.]+ MB freed")
    terminal.expect(pexpect.EOF)
    assert store.is_dir() == there


def test_rm_leaves_a_store_that_is_used_and_files_that_are_not_its_own(commands, store):
    using = StoreUse(store)
    refused = commands("rm", "tiny", "--yes")
    assert refused.status == 1
    assert refused.err == f"qmix: {store}: a running qmix uses it; end that first, then remove the store\n"
    assert listed(commands)[0]["in_use"]
    using.close()
    (store / "notes.txt").write_text("mine")
    done = commands("rm", "tiny", "--yes")
    assert done.status == 0
    assert "the directory stays, with notes.txt in it" in done.err
    assert [path.name for path in store.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_running_chat_keeps_its_store(commands, store):
    with subprocess.Popen([*COMMAND, "chat", "tiny"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as chat:
        assert chat.stdin is not None
        chat.stdin.write(b"Hello\n")
        chat.stdin.flush()
        assert chat.stdout is not None
        assert chat.stdout.read(1)
        assert "in use" in commands("ls").out
        assert commands("rm", "tiny", "--yes").status == 1
        chat.stdin.close()
    assert commands("rm", "tiny", "--yes").status == 0
    assert not store.exists()


def test_pull_tells_what_it_takes_then_makes_the_store_once(commands, tiny_cache, tiny, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", random_weights(TINY_CONFIG), TINY_CONFIG, tokenizer=tiny)
    done = commands("pull", checkpoint, "--precision", "int8", "--ram", "2GiB")
    assert done.status == 0, done.err
    lines = [line for line in done.lines if not line.startswith("pulling")]
    assert re.fullmatch(rf"{checkpoint}: [\d.]+ KiB to read, the store takes [\d.]+ KiB \(.*int8.*\)", lines[0])
    assert re.fullmatch(rf"disk: [\d.]+ KiB needed while it is made, [\d.]+ [GT]iB free in {tiny_cache}", lines[1])
    assert re.match(r"here: [\d.e+]+ tok/s \(.*\), prompts .*; of \d+ experts \d+ in 2 GiB of RAM", lines[2])
    assert lines[3].endswith(f"; run it with `qmix chat {checkpoint} --precision int8`")
    again = commands("pull", checkpoint, "--precision", "int8")
    assert again.status == 0
    assert "already there" in again.err
    found = next(entry for entry in listed(commands) if entry["precision"] == "int8")
    assert found["model"] == str(checkpoint)


def test_pull_refuses_what_cannot_run_here_before_any_work(commands, tiny_cache, tiny, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", random_weights(TINY_CONFIG), TINY_CONFIG, tokenizer=tiny)
    refused = commands("pull", checkpoint, "--ram", "10MB")
    assert refused.status == 3
    assert refused.err.rstrip().endswith("for another machine, make the store with `qmix quantize`")
    assert len(listed(commands)) == 1


def test_pull_of_a_store_is_refused(commands, store):
    refused = commands("pull", store)
    assert refused.status == 2
    assert f"{store}: is a store already" in refused.err


def test_verify_takes_the_names_of_ls(commands, store):
    (entry,) = listed(commands)
    for name in ("tiny", entry["id"], store):
        done = commands("verify", name)
        assert done.status == 0, done.err
        assert done.out.startswith(f"{store}: no damage found")


def test_stores_of_other_directories_are_listed(commands, store, tiny, tmp_path):
    made = make_store(tiny, tmp_path / "mine" / "tiny-int8", "int8")
    (entry,) = listed(commands, tmp_path / "mine")
    assert (entry["id"], entry["model"], entry["last_use"]) == ("tiny-int8", "tiny", None)
    assert Path(entry["directory"]) == made.directory
    assert commands("ls", tmp_path / "nowhere").status == 2


def test_a_removal_that_was_killed_goes_on(commands, store):
    for path in store.glob("experts-*"):
        path.unlink()
        break
    assert commands("show", "tiny").status == 1
    assert commands("rm", "tiny", "--yes").status == 0
    assert not store.exists()


@pytest.mark.slow
def test_pull_goes_on_after_it_was_stopped(commands, tiny_cache, tiny, tmp_path):
    checkpoint = tmp_path / "copy"
    shutil.copytree(tiny, checkpoint)
    shutil.rmtree(next(tiny_cache.glob("tiny-*/")))
    process = subprocess.Popen([*COMMAND, "pull", str(checkpoint), "--precision", "int8"], stderr=subprocess.PIPE)
    while not list(tiny_cache.glob("copy-*.partial/journal.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_SECONDS)
    if process.returncode != 0:  # a fast machine may have finished
        assert process.returncode == 130
        assert err.decode().endswith("interrupted; run the same command again to continue\n")
    assert commands("pull", checkpoint, "--precision", "int8").status == 0
    assert commands("verify", "copy").status == 0
    assert not list(tiny_cache.glob("*.partial"))


def test_a_directory_that_only_looks_partial_is_not_a_store(commands, tiny_cache, tmp_path):
    photos = tmp_path / "photos.partial"
    photos.mkdir()
    for name in ("journal.jsonl", "thesis.txt"):
        (photos / name).write_text("mine")
    refused = commands("rm", "--yes", tmp_path / "photos")
    assert (refused.status, sorted(path.name for path in photos.iterdir())) == (2, ["journal.jsonl", "thesis.txt"])


def test_rm_of_an_unfinished_store_leaves_other_files(commands, tiny, tiny_cache):
    interrupt_store(tiny, tiny_cache / "half", "int8", 3)
    (tiny_cache / "half.partial" / "notes.txt").write_text("mine")
    done = commands("rm", "--yes", "half")
    assert (done.status, "with notes.txt in it" in done.err) == (0, True)
    assert [path.name for path in (tiny_cache / "half.partial").iterdir()] == ["notes.txt"]
