"""A chat on a real terminal: editing, completion, history, Ctrl-C and Ctrl-D, and what is shown while it thinks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pexpect
import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from command import COMMAND, LIMIT_SECONDS, Commands
from terminals import Terminal

ASK = "How do I install a package?"
GREEDY = ("chat", "tiny", "--temperature", "0", "--max-new-tokens", "24")
ENDLESS = ("chat", "tiny", "--temperature", "1", "--seed", "1", "--ignore-eos")
READY = r"\x1b\[\?2004h.*?>>>.*?\x1b\[\?25h"  # prompt_toolkit reads pastes as such from here on, and shows the cursor
ENTERED = r"\x1b\[\?2004l"  # and from here on it does not read
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
STATISTICS = r"\d+ (?:new )?prompt tokens?[\s\S]*?seed \d+\r\n"  # folded where the terminal is narrow
LOADED = "Ctrl-D leaves\r\n"
HINT = "Ctrl-D or /exit leaves; Ctrl-C stops an answer\r\n"


class Typist:
    """Somebody at a terminal with a chat, who waits until the model is loaded; `greeting` is what was shown by then."""

    def __init__(self, commands: Commands, *argv: str | Path, columns: int = 160, **environment: str) -> None:
        self.terminal = Terminal(commands, *argv, columns=columns, environment=environment, encoding="utf-8")
        self.greeting = ESCAPES.sub(
            "", self.ready()
        )  # before the prompt of the first turn, which comes before the model
        if "--quiet" not in argv:
            self.terminal.expect_exact(LOADED)
            self.greeting += ESCAPES.sub("", self.terminal.before + LOADED)
            self.ready()

    def ready(self) -> str:
        self.terminal.expect(READY)
        return self.terminal.before

    def enter(self, *keys: str) -> str:
        """Type, Enter last; the text that is shown until it is ready again."""
        for key in keys:
            self.terminal.send(key)
        self.terminal.send("\r")
        self.terminal.expect(ENTERED)
        return ESCAPES.sub("", self.ready())

    def leave(self, key: str = "\x04") -> int | None:
        self.terminal.send(key)
        self.terminal.expect(pexpect.EOF)
        self.terminal.close()
        return self.terminal.exitstatus


@pytest.fixture
def sit_down(qmix):
    """Typists, sent home after the test."""
    there = []

    def begin(*argv, **options):
        there.append(Typist(qmix, *argv, **options))
        return there[-1]

    yield begin
    for typist in there:
        typist.terminal.close(force=True)


def begun(*argv: str) -> pexpect.spawn:
    return pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *argv],
        dimensions=(24, 160),
        env=os.environ | {"TERM": "xterm-256color"},
        encoding="utf-8",
        timeout=LIMIT_SECONDS,
    )


def test_the_first_turn_is_typed_while_the_model_is_loaded(qmix, sit_down, tmp_path):
    """The prompt is there before the model, with a line below it; what is entered then is answered."""
    terminal = begun(*GREEDY)
    terminal.expect_exact("\x1b[6n")  # asks for the cursor's place, without which nothing is shown below the prompt
    terminal.send("\x1b[1;1R")
    terminal.expect_exact("loading tiny")
    terminal.send(f"{ASK}\r")
    terminal.expect(ENTERED)
    terminal.expect(STATISTICS)
    shown = ESCAPES.sub("", terminal.before)
    assert shown.count(LOADED) == 1
    assert qmix(*GREEDY, stdin=ASK.encode()).out.strip() in shown.replace("\r\n", "\n")
    terminal.send("\x04")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@pytest.mark.parametrize(("key", "status"), [("\x04", 0), ("\x03", 130)])
def test_leaving_while_the_model_is_loaded(qmix, key, status):
    terminal = begun(*GREEDY)
    terminal.expect(">>>")
    terminal.send(key)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == status
    assert LOADED not in terminal.before


def test_a_store_that_is_damaged_is_told_below_the_prompt(qmix, tiny, tmp_path):
    store = tmp_path / "store"
    assert qmix("quantize", tiny, store).status == 0
    with (store / "dense.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(reversed(range(256))) * 16)
    terminal = begun("chat", str(store))
    terminal.expect(">>>")
    terminal.expect("is damaged")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus not in (0, 130)


def turns_of(path: Path) -> list[tuple[str, str]]:
    return [(turn["user"], turn["answer"]) for turn in json.loads(path.read_text())["turns"]]


def test_a_turn_is_answered_and_summed_up_and_ctrl_d_leaves(qmix, sit_down, tmp_path):
    typist = sit_down(*GREEDY)
    assert typist.greeting.endswith("tiny: /help lists the commands, Ctrl-D leaves\r\n")
    shown = typist.enter(ASK)
    answer = qmix(*GREEDY, stdin=ASK.encode()).out
    assert re.fullmatch(re.escape(answer.replace("\n", "\r\n")) + STATISTICS, shown), shown
    again = typist.enter("/regen")
    assert again.startswith(answer.rstrip("\n"))
    assert "1 new prompt token (" in again
    assert typist.enter(f"/save {tmp_path}/s") == f"saved 1 turn to {tmp_path}/s\r\n"
    assert typist.leave() == 0
    quiet = sit_down(*GREEDY, "--quiet")
    assert quiet.greeting == ""
    assert quiet.enter(ASK) == answer.replace("\n", "\r\n")
    assert quiet.leave("/exit\r") == 0


def test_turns_of_several_lines(sit_down, tmp_path):
    typist = sit_down(*GREEDY)
    typist.enter("one", "\x1b\r", "two")
    typist.enter('"""three', "\r", "four", "\r", '"""')
    typist.enter("\x1b[200~five\r\nsix\x1b[201~")  # pasted
    typist.enter(f"/save {tmp_path}/s")
    assert [user for user, _ in turns_of(tmp_path / "s")] == ["one\ntwo", "three\nfour", "five\nsix"]


def test_ctrl_c_stops_an_answer_and_keeps_the_session(sit_down, tmp_path):
    typist = sit_down(*ENDLESS)
    typist.terminal.send(f"{ASK}\r")
    typist.terminal.expect(ENTERED)
    typist.terminal.expect(r"\w+ \w+ \w+")
    begun = typist.terminal.after
    for _ in range(3):  # an impatient one
        typist.terminal.sendintr()
    shown = typist.ready()
    # the terminal's own ^C may come before a word that was on its way
    assert re.search(r"\^C[^\r\n]*\r\nstopped after \d+ tokens\r\n$", shown), shown
    assert "Traceback" not in shown
    assert len(typist.enter("/set max_new_tokens 8")) > 10
    assert re.search(r"\d+ new prompt tokens \([1-9]\d+ cached\)", typist.enter("And then?"))
    typist.enter(f"/save {tmp_path}/s")
    (_, first), (user, second) = turns_of(tmp_path / "s")
    assert begun in first
    assert (user, bool(second)) == ("And then?", True)
    assert typist.leave() == 0


def test_ctrl_c_at_an_empty_prompt_hints_and_in_a_line_drops_it(sit_down, tmp_path):
    typist = sit_down(*GREEDY)
    typist.terminal.send("\x03")
    assert typist.ready().endswith(HINT)
    typist.terminal.send("not meant\x03")
    assert HINT not in typist.ready()
    assert typist.enter("/stats").startswith("0 turns")
    assert typist.leave() == 0


def test_tab_completes_commands_files_and_settings(sit_down, tmp_path):
    (tmp_path / "a question.txt").write_text(f"{ASK}\n")
    (tmp_path / "only-one").write_text("What is a file?")
    typist = sit_down(*GREEDY)
    assert typist.enter("/mo\t").startswith("tiny in ")
    assert "top_p 0.5" in typist.enter("/set top_p\t 0.5")
    typist.enter(f"/read {tmp_path}/only\t")
    typist.enter(f"/save {tmp_path}/s")
    assert [user for user, _ in turns_of(tmp_path / "s")] == ["What is a file?"]


def test_history_is_kept_for_the_user_alone_unless_it_is_not_wanted(sit_down, isolated_home, tmp_path):
    kept = isolated_home / "state" / "qmix" / "chat-history"
    home = {"XDG_STATE_HOME": str(isolated_home / "state")}
    sit_down(*GREEDY, "--no-history", **home).enter("/stats")
    assert not kept.exists()
    sit_down(*GREEDY, **home).enter("/system Be brief.")
    assert "+/system Be brief." in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600
    up = "\x1b[A"
    assert sit_down(*GREEDY, **home).enter(up) == "system: Be brief.\r\n"
    assert sit_down(*GREEDY, "--no-history", **home).enter(up, "/stats").startswith("0 turns")
    (tmp_path / "file").touch()
    odd = sit_down(*GREEDY, XDG_STATE_HOME=str(tmp_path / "file"))
    assert f"history is not saved: {tmp_path}/file/qmix: Not a directory\r\n" in odd.greeting
    assert odd.enter("/undo") == "qmix: nothing has been said yet\r\n"


@pytest.fixture(scope="module")
def slow(tiny, tmp_path_factory) -> Path:
    """Many small layers: a long prompt takes a while. Its answers are random bytes, control characters among them."""
    directory = tmp_path_factory.mktemp("slow")
    sizes = {"num_hidden_layers": 40, "vocab_size": 4096, "max_position_embeddings": 4096, "num_local_experts": 8}
    return write_checkpoint(directory, random_weights(TINY_CONFIG | sizes), TINY_CONFIG | sizes, tokenizer=tiny)


def test_while_it_thinks_a_line_says_where_and_is_gone_with_the_first_token(sit_down, qmix, slow, tmp_path):
    (tmp_path / "long").write_text("click the button to open a file. " * 400)
    smallest = json.loads(qmix("plan", slow, "--json").out)["smallest"]
    typist = sit_down("chat", slow, "--ram", str(smallest), "--max-new-tokens", "12", "--temperature", "0", columns=70)
    typist.terminal.send(f"/read {tmp_path}/long\r")
    typist.terminal.expect(ENTERED)
    shown = typist.ready()
    frames = re.findall(r"thinking: layer (\d+) of 40, (\d+)% of experts in memory, ([\d.]+ [kMG]?B)", shown)
    assert len({layer for layer, _, _ in frames}) > 3
    assert all(1 <= int(layer) <= 40 for layer, _, _ in frames)
    assert len({read for _, _, read in frames}) > 3
    _before, _, after = shown.rpartition("thinking")
    assert "\x1b[2K" in after  # the line is wiped
    assert "\x1b[?25h" in after
    assert re.search(STATISTICS, ESCAPES.sub("", after))
    assert max(len(ESCAPES.sub("", line)) for line in re.split(r"[\r\n]+", shown) if "thinking" in line) <= 70


def test_ctrl_c_before_the_first_token_takes_the_turn_back(sit_down, slow, tmp_path):
    (tmp_path / "long").write_text("click the button to open a file. " * 400)
    typist = sit_down("chat", slow, "--max-new-tokens", "4", "--temperature", "0")
    typist.terminal.send(f"/read {tmp_path}/long\r")
    typist.terminal.expect("thinking")
    typist.terminal.sendintr()
    assert "stopped before the first token; this turn is not kept\r\n" in typist.ready()
    assert typist.enter("/stats").startswith("0 turns")
    assert re.search(STATISTICS, typist.enter("What?"))


def test_a_models_control_characters_do_not_reach_the_terminal(sit_down, slow):
    """Random weights draw from all tokens, those for single bytes too."""
    typist = sit_down("chat", slow, "--temperature", "100", "--top-k", "0", "--top-p", "1", "--seed", "1", "--quiet")
    typist.enter("/set max_new_tokens 400")
    typist.terminal.send("What?\r")
    typist.terminal.expect(ENTERED)
    typist.terminal.expect(r"(.*?)\x1b\[\?12l")  # of prompt_toolkit, before the next line is read
    answer = ESCAPES.sub("", typist.terminal.match[1])  # those of the line that says it is thinking
    assert len(answer) > 400
    controls = {chr(code) for code in (*range(32), *range(127, 160))}
    assert set(answer) & controls <= {"\r", "\n", "\t"}


def test_one_side_that_is_no_terminal_makes_it_plain(qmix, slow, tmp_path):
    """Typed on a terminal, answers to a file: nothing but them is there."""
    script = f"{' '.join(COMMAND)} {' '.join(GREEDY)} > {tmp_path}/out"
    terminal = pexpect.spawn("/bin/sh", ["-c", script], encoding="utf-8", timeout=LIMIT_SECONDS)
    terminal.expect("Ctrl-D leaves\r\n>>> ")
    terminal.send(f"{ASK}\r")
    terminal.expect(r"seed \d+\r\n>>> ")
    terminal.send("\x03")
    terminal.expect_exact(HINT)
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    assert (tmp_path / "out").read_text() == qmix(*GREEDY, stdin=ASK.encode()).out
