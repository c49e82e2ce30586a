"""A chat whose lines come from a pipe: commands, options, base models, errors that keep the session."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest
from command import COMMAND, LIMIT_SECONDS
from test_chat_ids import INSTRUCT, WITH_SYSTEM
from test_chat_session import ASK, CHAT, MORE, counts, typed

NOT_SAID = "the chat template has no system role; the system prompt goes into the first turn"
BASE_NOTICE = "has no chat template: a pretrained base model, without any moderation mechanisms; it continues your text"


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """tiny with other chat templates, by name; `base` has none."""
    found = {}
    for name, template in (("base", None), ("instruct", INSTRUCT), ("system", WITH_SYSTEM)):
        found[name] = tmp_path_factory.mktemp("models") / name
        shutil.copytree(tiny, found[name], ignore=shutil.ignore_patterns("recipe", "*.jinja"))
        if template is not None:
            (found[name] / "chat_template.jinja").write_text(template)
    return found


def test_every_bad_line_is_one_error_line_and_the_session_goes_on(qmix, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "empty").touch()
    cases = {
        "/regn": "/regn: unknown command; did you mean /regen?",
        "/xyz": "/xyz: unknown command; did you mean /",
        "/clear all": "/clear: takes no argument",
        "/save": "/save: needs FILE [--cache]",
        "/undo": "nothing has been said yet",
        "/regen": "/regen: nothing has been said yet",
        "/set heat 1": "/set heat: unknown setting; choose one of temperature, top_p",
        "/set temperature": "/set temperature: give a value, or default",
        "/set temperature hot": "/set temperature hot: give a number, or default",
        "/set temperature 900": "/set temperature 900.0: must be 0 (greedy)",
        "/set top_k 1.5": "/set top_k 1.5: give a number",
        f"/read {tmp_path}/none": f"/read {tmp_path}/none: No such file or directory",
        f"/read {tmp_path}/bytes": f"/read {tmp_path}/bytes: not UTF-8 text",
        f"/read {tmp_path}/empty": f"/read {tmp_path}/empty: is empty",
        '/read "': "no closing quotation",
        "a b " * 1100: "this turn is 2204 tokens, too long for a context of 2048, the model's longest; shorten it",
        "word " * 2100: "this turn is 10500 bytes, too long for a context of 2048, the model's longest; shorten it",
        "word " * 20000: "stdin: a line is longer than 65536 bytes, more than the context holds; shorten it",
        "/read /dev/zero": "/read /dev/zero: larger than 4194304 bytes; give a text file of at most 4 MiB",
    }
    done = qmix(*CHAT, "--quiet", stdin=typed(*cases, "", "  ", ASK))
    assert done.status == 1
    assert len(done.lines) == len(cases)
    for line, told in zip(done.lines, cases.values(), strict=True):
        assert line.startswith("qmix: ")
        assert told in line
    assert (done.out.count("\n"), len(done.out) > 10) == (1, True)


def test_what_is_no_text_is_an_error_and_the_next_line_a_turn(qmix):
    done = qmix(*CHAT, "--quiet", stdin=b"\xff\xfe\n" + typed(ASK))
    assert (done.status, done.err) == (1, "qmix: stdin: a line is not UTF-8 text (byte 0)\n")
    assert len(done.out) > 10


def test_commands_say_on_stderr_what_they_did(qmix, tmp_path):
    lines = (ASK, "/undo", "/system Be brief.", "/system", '/system ""', "/set top_k 5", "/set top-k default", "/clear")
    done = qmix(*CHAT, "--quiet", stdin=typed(*lines, "/help", "/model", "/exit", "not read any more"))
    assert done.status == 0
    assert done.out.count("\n") == 1
    assert done.lines[:7] == [
        f"removed: {ASK}",
        "system: Be brief.",
        "system: Be brief.",
        "system: none",
        "settings: temperature 0.0, max_new_tokens 24, top_k 5",
        "settings: temperature 0.0, max_new_tokens 24",
        "cleared",
    ]
    names = {line.split()[0] for line in done.lines[7:] if line.startswith("/")}
    assert names == {
        "/help",
        "/clear",
        "/regen",
        "/undo",
        "/system",
        "/set",
        "/save",
        "/load",
        "/read",
        "/stats",
        "/model",
        "/exit",
    }
    assert any(
        line.startswith("experts in nf4, 48 of 48 in memory; dense weights in bf16; context 2048, ")
        for line in done.lines
    )


def test_a_file_is_a_turn_with_a_question_behind_it(qmix, tmp_path):
    (tmp_path / "a file").write_text(f"{ASK}\n")
    whole = qmix(*CHAT, stdin=typed(f'"""{ASK}', "", 'In short?"""'))
    read = qmix(*CHAT, stdin=typed(f"/read '{tmp_path}/a file' In short?", "/stats"))
    assert read.out == whole.out
    assert counts(read) == counts(whole)
    assert read.lines[1].startswith("1 turn (0 dropped from the context), ")


def test_a_base_model_continues_and_its_notice_comes_once(qmix, models):
    done = qmix("chat", models["base"], *CHAT[2:], "--quiet", stdin=typed("Click the button", "the file"))
    notice = f"{models['base']} {BASE_NOTICE}"
    assert [line for line in done.lines if "moderation" in line] == [notice]
    first, second = done.out.splitlines()
    generated = qmix(
        "generate", "Click the button", "-m", models["base"], "--temperature", "0", "--max-new-tokens", "24"
    )
    assert first == generated.out.rstrip("\n")
    assert len(second) > 3


def test_a_system_text_goes_where_the_template_takes_it(qmix, models, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    for name, said in (("instruct", 1), ("system", 0), ("base", 1)):
        options = ("chat", models[name], *CHAT[2:], "--quiet")
        plain, with_text = (qmix(*options, *more, stdin=typed(ASK, MORE)) for more in ((), ("-s", "Be brief.")))
        assert with_text.lines.count(NOT_SAID) == said
        assert plain.lines.count(NOT_SAID) == 0
        assert plain.out != with_text.out
        from_file = qmix(*options, "--system-file", tmp_path / "system.txt", stdin=typed(ASK, MORE))
        assert from_file.out == with_text.out
    first = qmix("chat", models["instruct"], *CHAT[2:], "-q", stdin=typed('"""Be brief.', "", f'{ASK}"""'))
    told = qmix("chat", models["instruct"], *CHAT[2:], "-q", "-s", "Be brief.", stdin=typed(ASK))
    assert first.out == told.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-s", "a", "--system-file", "b"), "--system and --system-file: give only one of them"),
        (("--system-file", "none"), "--system-file none: No such file or directory"),
        (("--temperature", "-1"), "--temperature -1.0: must be 0 (greedy)"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_loaded(qmix, options, told):
    done = qmix("chat", "no/such", *options, stdin=typed(ASK))
    assert (done.status, done.out, len(done.lines)) == (2, "", 1)
    assert told in done.err


def test_a_seed_fixes_a_session_and_regen_draws_anew(qmix):
    options = ("chat", "tiny", "--seed", "3", "--temperature", "1", "--max-new-tokens", "12", "-q")
    first, again = (qmix(*options, stdin=typed(ASK, "/regen", MORE)).out for _ in range(2))
    assert first == again
    answers = first.splitlines()
    assert answers[0] != answers[1]


def test_a_long_chat_never_ends_in_an_exception(qmix):
    done = qmix(*CHAT, "--context", "96", stdin=typed(*[f"{ASK} {number}" for number in range(15)]))
    assert (done.status, done.out.count("\n")) == (0, 15)
    gone = [line for line in done.lines if line.startswith("the context of 96 tokens is full: dropped the ")]
    assert len(gone) >= 3
    assert len(counts(done)) == 15
    assert sum(kept > 0 for _, kept, _ in counts(done)) >= 10


def test_an_interrupt_ends_a_chat_that_nobody_sits_at(qmix):
    options = ("chat", "tiny", "--ignore-eos", "--seed", "1")
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *options], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(typed(ASK, ASK))
        process.stdin.flush()
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_SECONDS) == 130
        assert process.stderr.read() == b"qmix: interrupted\n"
