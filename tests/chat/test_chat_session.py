"""Sessions in files: what /save writes, /load and --resume take, through the command with its streams piped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from command import COMMAND
from safetensors import safe_open

ASK = "How do I install a package?"
MORE = "And how is it removed again?"

CHAT = ("chat", "tiny", "--temperature", "0", "--max-new-tokens", "24")
COUNTS = re.compile(r"^(\d+) (?:new )?prompt tokens?(?: \((\d+) cached\))? in .* (\d+) new tokens? at ", re.MULTILINE)


def counts(finished) -> list[tuple[int, int, int]]:
    """Prompt tokens computed, kept from before, and new ones, of each answer."""
    return [tuple(int(figure or 0) for figure in found) for found in COUNTS.findall(finished.err)]


def typed(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


@pytest.fixture(scope="module")
def whole(commands, first_use):
    """Two turns in one session."""
    return commands(*CHAT, stdin=typed(ASK, MORE), XDG_CACHE_HOME=str(first_use.cache))


def test_a_piped_chat_is_a_turn_a_line_and_answers_alone_on_stdout(qmix, whole):
    assert whole.status == 0
    first, second = whole.out.splitlines()
    assert min(len(first), len(second)) > 10
    assert len(whole.lines) == 2
    (computed, kept, new), (more, held, _) = counts(whole)
    assert (kept, computed) == (0, len(["<s>", "[INST]"]) + computed - 2)
    assert held == computed + new - 1
    assert more < 20
    alone = qmix(*CHAT, stdin=typed(ASK))
    assert alone.out == first + "\n"


def test_a_session_goes_on_in_another_process_as_if_it_had_not_ended(qmix, whole, tmp_path):
    """With the cache, the next turn takes in its own tokens alone; without, everything, and says the same here."""
    saved = qmix(*CHAT, stdin=typed(ASK, f"/save {tmp_path}/plain.json", f"/save {tmp_path}/s.json --cache"))
    assert saved.status == 0
    assert saved.lines[-3:-1] == [f"saved 1 turn to {tmp_path}/plain.json", f"saved 1 turn to {tmp_path}/s.json"]
    cache = tmp_path / "s.json.kv.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {"plain.json", "s.json", cache.name}
    second = whole.out.splitlines()[1] + "\n"
    (_, kept, _) = counts(whole)[1]
    with_cache = qmix(*CHAT, "--resume", tmp_path / "s.json", stdin=typed(MORE))
    assert with_cache.lines[:2] == [
        f"loaded 1 turn from {tmp_path}/s.json",
        f"loaded {kept} tokens into the KV cache",
    ]
    assert (with_cache.out, counts(with_cache)) == (second, [counts(whole)[1]])
    loaded = qmix(*CHAT, stdin=typed("Something else", f"/load {tmp_path}/s.json", MORE))
    assert (loaded.out.splitlines()[1] + "\n", counts(loaded)[1]) == (second, counts(whole)[1])
    without = qmix(*CHAT, "--resume", tmp_path / "plain.json", stdin=typed(MORE))
    (computed, reused, _) = counts(without)[0]
    assert (computed, reused) == (sum(counts(whole)[1][:2]), 0)


def test_a_saved_session_is_json_and_the_cache_real_safetensors(qmix, tmp_path):
    qmix(*CHAT, "-s", "Be brief.", stdin=typed(ASK, "/set top_k 7", f"/save {tmp_path}/s --cache"))
    content = json.loads((tmp_path / "s").read_text())
    (turn,) = content["turns"]
    assert (content["schema"], content["system"], content["forgotten"]) == ("qmix-chat-1", "Be brief.", 0)
    assert content["settings"] == {"temperature": 0.0, "max_new_tokens": 24, "top_k": 7}
    assert (turn["user"], turn["kept"]) == (ASK, 0)
    ids = turn["opening"] + turn["answer_ids"]
    with safe_open(tmp_path / "s.kv.safetensors", framework="pt") as file:
        assert file.get_tensor("token_ids").tolist() == ids[:-1]
        assert len(file.keys()) == 1 + 2 * 6
        assert tuple(file.get_tensor("layers.5.values").shape) == (2, len(ids) - 1, 32)
        assert file.metadata()["format"] == "qmix-kv-1"


def changed(path, **fields) -> str:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


DAMAGED = (
    (lambda path: path.write_text("{"), "invalid JSON: "),
    (lambda path: path.write_text("[]"), "expected object, got array; give a file that /save wrote"),
    (lambda path: changed(path, schema="qmix-chat-9"), "not a chat of this qmix version (schema 'qmix-chat-9'"),
    (
        lambda path: changed(path, turns=[{"user": "a"}]),
        "turns[0]: object missing required field answer;",
    ),
    (lambda path: changed(path, turns=None), "turns: expected array, got null; give a file"),
    (lambda path: changed(path, system=3), "system: expected str, got int; give a file"),
    (lambda path: changed(path, forgotten=2), "damaged or changed (more turns dropped than there are)"),
    (lambda path: changed(path, settings={"temperature": "hot"}), "damaged or changed (the setting 'temperature')"),
    (lambda path: changed(path, settings={"temperature": 900.0}), "damaged or changed (temperature 900.0: must"),
    (lambda path: path.write_text(path.read_text().replace('"kept": 0', '"kept": 7')), "the token ids of turn 1"),
    (lambda path: path.unlink(), "No such file or directory"),
    (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
)


def test_a_file_that_is_no_session_is_an_error_of_one_line_and_the_chat_goes_on(qmix, saved, tmp_path):
    paths = [tmp_path / f"s{number}.json" for number in range(len(DAMAGED))]
    for path, (damage, _) in zip(paths, DAMAGED, strict=True):
        shutil.copy(saved / "s.json", path)
        damage(path)
    done = qmix(*CHAT, "--quiet", stdin=typed(*(f"/load {path}" for path in paths), ASK))
    assert (done.status, len(done.lines)) == (1, len(paths))
    for line, path, (_, told) in zip(done.lines, paths, DAMAGED, strict=True):
        assert line.startswith(f"qmix: {path}: ")
        assert told in line
    assert len(done.out) > 10
    refused = qmix(*CHAT, "--resume", paths[0], stdin=typed(ASK))
    assert (refused.status, refused.out, refused.lines) == (1, "", done.lines[:1])


@pytest.fixture(scope="module")
def saved(commands, first_use, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    line = f"/save {directory}/s.json --cache"
    commands(*CHAT, stdin=typed(ASK, line), XDG_CACHE_HOME=str(first_use.cache))
    return directory


def flipped(path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


UNFIT = (
    (flipped, "damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
    (lambda path: path.write_bytes(b"no safetensors"), "not a safetensors file, or cut short"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b"qmix-kv-1", b"qmix-kv-9")), "not a KV cache that"),
    (
        lambda path: path.write_bytes(re.sub(rb'"store":"....', b'"store":"0000', path.read_bytes())),
        "of another model",
    ),
)


def test_a_cache_that_does_not_fit_is_told_and_computed_again(qmix, saved, whole, tmp_path):
    lines = []
    for number, (damage, _) in enumerate(UNFIT):
        path = tmp_path / f"s{number}"
        shutil.copy(saved / "s.json", path)
        shutil.copy(saved / "s.json.kv.safetensors", f"{path}.kv.safetensors")
        damage(tmp_path / f"s{number}.kv.safetensors")
        lines += [f"/load {path}", MORE]
    done = qmix(*CHAT, stdin=typed(*lines))
    assert done.status == 0
    for told, (_, expected) in zip(done.lines[1::3], UNFIT, strict=True):
        assert expected in told
        assert told.endswith("the next turn computes the conversation again")
    assert [found[:2] for found in counts(done)] == [(sum(counts(whole)[1][:2]), 0)] * len(UNFIT)
    small = qmix(*CHAT, "--context", "24", "--resume", saved / "s.json", stdin=typed("More"))
    assert "holds 30 tokens, more than the context of 24" in small.lines[1]
    assert "the context of 24 tokens is full: dropped the oldest turn" in small.err


def test_the_cache_of_another_conversation_is_used_as_far_as_it_goes(qmix, saved, tmp_path):
    shutil.copy(saved / "s.json.kv.safetensors", tmp_path)
    qmix(*CHAT, stdin=typed("How do I install a printer?", f"/save {tmp_path}/s.json"))
    done = qmix(*CHAT, "--resume", tmp_path / "s.json", stdin=typed(MORE))
    assert done.lines[1].endswith("of another conversation; the next turn computes what differs")
    assert 4 < counts(done)[0][1] < 12


def test_another_model_takes_the_texts(qmix, saved, tiny, tmp_path):
    """Here the same weights without a chat template: a base model, for which the ids would be wrong."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base, ignore=shutil.ignore_patterns("recipe", "*.jinja"))
    done = qmix("chat", base, *CHAT[2:], "--resume", saved / "s.json", stdin=typed(MORE))
    assert done.status == 0
    said = [line for line in done.lines if not line.startswith("quantizing")]
    assert "only its texts are used, and the next turn computes them again" in said[1]
    assert "of another conversation" in said[2]
    assert said[3] == (
        f"{base} has no chat template: a pretrained base model, without any moderation mechanisms; "
        "it continues your text"
    )
    assert counts(done)[0][1] < 5


def test_what_cannot_be_written_leaves_what_was_there(qmix, tmp_path):
    (tmp_path / "kept").write_text("old")
    done = qmix(
        *CHAT, "--quiet", stdin=typed(f"/save {tmp_path}/none/s", f"/save {tmp_path}", f"/save {tmp_path}/kept x")
    )
    assert done.lines == [
        f"qmix: {tmp_path}/none/s: cannot be written (No such file or directory); give another name",
        f"qmix: {tmp_path}: cannot be written (not a regular file); give another name",
        "qmix: /save: give one file; quote a name with spaces",
    ]
    assert (tmp_path / "kept").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_no_file_is_not_replaced_by_one(qmix, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = qmix(*CHAT, "--quiet", stdin=typed(f"/save {tmp_path}/pipe --cache"))
    assert done.err == f"qmix: {tmp_path}/pipe: cannot be written (not a regular file); give another name\n"
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_names_with_spaces_and_links_are_files_like_any_other(qmix, tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "a link").symlink_to(tmp_path / "target")
    done = qmix(*CHAT, "-q", stdin=typed(ASK, f'/save "{tmp_path}/a link"', f"/load '{tmp_path}/a link'", "/save 'a"))
    assert done.lines[:2] == [f"saved 1 turn to {tmp_path}/a link", f"loaded 1 turn from {tmp_path}/a link"]
    assert done.lines[2].startswith("qmix: /save 'a: no closing quotation")
    assert (tmp_path / "a link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["schema"] == "qmix-chat-1"


@pytest.mark.slow
def test_killed_while_it_saves_leaves_the_old_session_or_the_new(qmix, tmp_path, first_use):
    """Nothing between: the name always means a whole file."""
    for count in (1, 30):
        process = subprocess.Popen(
            [*COMMAND, *CHAT, "-q"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        process.stdin.write(typed(ASK, *[f"/save {tmp_path}/s"] * 200))  # less than what a pipe holds
        process.stdin.flush()
        lines = (line for line in process.stderr if not line.startswith(b"a chat was interrupted"))  # the round before
        for _ in range(count):
            assert next(lines).startswith(b"saved 1 turn")
        process.kill()
        process.communicate()
        assert len(json.loads((tmp_path / "s").read_text())["turns"]) == 1
