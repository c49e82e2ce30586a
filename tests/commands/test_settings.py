"""Options from the environment and the config file, `qmix config`, and how much a command says."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command import COMMAND

HEAVY = {"torch", "transformers", "numba", "rich", "huggingface_hub"}
HELLO = ("generate", "Hello", "-m", "tiny", "--max-new-tokens", "2")


@pytest.fixture
def file(qmix, tmp_path, monkeypatch) -> Path:
    """The config file, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "qmix" / "config.toml"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def planned(done) -> dict:
    assert done.status == 0, done.err
    return json.loads(done.out)


def test_command_line_before_environment_before_table_before_top(qmix, file):
    def context(*argv, **environment):
        return planned(qmix("plan", "tiny", "--json", *argv, **environment))["context"]

    assert context() == 2048
    write(file, "context = 100\n")
    assert context() == 100
    write(file, "context = 100\n[plan]\ncontext = 200\n[chat]\ncontext = 300\n")
    assert context() == 200
    assert context(QMIX_CONTEXT="400") == 400
    assert context("--context", "500", QMIX_CONTEXT="400") == 500
    assert context(QMIX_CONTEXT="") == 200


@pytest.mark.parametrize(
    ("environment", "content", "argv", "told"),
    [
        ({"QMIX_CONTEXT": "99999"}, "", HELLO, r"qmix: --context 99999: .* \(--context is set by QMIX_CONTEXT\)"),
        ({}, "context = 99999", HELLO, r"qmix: --context 99999: .* \(--context is set by FILE, key context\)"),
        (
            {},
            "[generate]\nram = 1000000",
            HELLO,
            r"qmix: does not fit 1 MB .*--ram is set by FILE, key generate.ram\)",
        ),
        (
            {"QMIX_TEMPERATURE": "-1"},
            "",
            HELLO,
            r"qmix: --temperature -1.0: .* is set by QMIX_TEMPERATURE\)",
        ),
        ({"QMIX_RAM": "12x"}, "", HELLO, r"--ram is set by QMIX_RAM"),
        ({"QMIX_MODEL": "nobody"}, "", ("plan",), r"qmix: nobody: not found: .* \(model is set by QMIX_MODEL\)"),
    ],
)
def test_an_error_names_where_a_wrong_value_came_from(qmix, file, environment, content, argv, told):
    write(file, content)
    done = qmix(*argv, **environment)
    assert done.status in (2, 3)
    assert re.fullmatch(told.replace("FILE", re.escape(str(file))), done.lines[-1]), done.err


def test_what_was_typed_takes_the_place_of_what_excludes_it(qmix, file, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(qmix("plan", "tiny", "--ram", "2GiB", "--json").out)
    write(file, 'ram = "3GiB"\ngpu = ["none"]\n')
    done = qmix(*HELLO, "--plan", plan)
    assert done.status == 0, done.err
    assert "of 2.15 GB" in done.err
    done = qmix(*HELLO, "--ram", "1GiB", QMIX_PLAN=str(plan))
    assert "of 1 GiB" in done.err
    write(file, f'ram = "3GiB"\nplan = "{plan}"\n')
    both = qmix(*HELLO)
    assert both.status == 2
    assert "--plan and --ram: the plan sets it already" in both.err
    assert f"--ram is set by {file}, key ram" in both.err


def test_the_variable_of_a_kubernetes_service_is_no_port(qmix, file):
    """A Service called qmix sets QMIX_PORT in every pod beside it."""
    link = "tcp://10.0.0.1:80"
    write(file, "[serve]\nport = 0\n")
    done = qmix("serve", "tiny", "--context", "100000", QMIX_PORT=link)
    assert (
        done.lines[0] == f"QMIX_PORT is {link}, which Kubernetes sets for a service called qmix: not used, give --port"
    )
    assert done.lines[-1].startswith("qmix: --context 100000: ")
    assert "QMIX_PORT" not in qmix("serve", "tiny", "--port", "0", "--context", "100000", QMIX_PORT=link).err
    assert link not in qmix("config", QMIX_PORT=link).out
    wrong = qmix("serve", "tiny", QMIX_PORT="80x")
    assert (wrong.status, wrong.lines[-1]) == (2, "--port is set by QMIX_PORT")


def test_flags_and_repeatable_options(qmix, file):
    write(file, 'ignore-eos = true\nstop = ["a", "e"]\n')
    text = json.loads(qmix(*HELLO, "--json", "--temperature", "0", "--max-new-tokens", "30").out)["text"]
    assert "a" not in text
    assert "e" not in text
    two = planned(qmix("plan", "mixtral-8x7b", "--ram", "64GiB", "--json", QMIX_GPU="24GiB, RTX 4090"))
    assert len(two["machine"]["gpus"]) == 2
    assert qmix(*HELLO, QMIX_IGNORE_EOS="perhaps").status == 2


def test_a_model_for_all_commands(qmix, file):
    write(file, 'model = "tiny"\n')
    assert "no model given" not in qmix("generate", "Hello", "--max-new-tokens", "1").err
    assert "no model given" in qmix("generate", "Hello", "--max-new-tokens", "1", XDG_CONFIG_HOME="/nowhere").err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("rma = 1\n", "FILE: rma: not an option of any command; did you mean ram?"),
        ("[chatt]\nram = 1\n", "FILE: [chatt]: no such command; did you mean chat?"),
        ("[chat]\ntemprature = 1\n", "FILE: temprature in [chat]: not an option of chat; did you mean temperature?"),
        ("json = true\n", "FILE: json: not an option of any command; "),
        ("ram = \n", "FILE: invalid TOML: "),
        ("ram = 1\nram = 2\n", "FILE: invalid TOML: "),
        ("\xff", "FILE: "),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(qmix, file, content, told):
    write(file, content)
    done = qmix(*HELLO)
    assert done.status == 2
    assert done.lines[-1].startswith(f"qmix: {told.replace('FILE', str(file))}"), done.err
    assert qmix("--help").status == 0


def test_config_edits_the_file_and_keeps_its_comments(qmix, file):
    assert qmix("config", "path").out == f"{file}\n"
    assert "not there yet" in qmix("config").err
    write(file, '# mine\nram = "2GiB"  # all of it\n\n[chat]\ntemperature = 0.5\n')
    assert qmix("config", "set", "ram", "3GiB").status == 0
    assert qmix("config", "set", "chat.max-new-tokens", "100").status == 0
    assert qmix("config", "set", "gpu", "24GiB", "RTX 4090").status == 0
    assert qmix("config", "set", "generate.ignore-eos", "yes").status == 0
    assert qmix("config", "unset", "chat.temperature").status == 0
    text = file.read_text()
    assert "# mine\n" in text
    assert 'ram = "3GiB"' in text
    assert "# all of it" in text
    shown = qmix("config", QMIX_CONTEXT="7")
    assert shown.out.splitlines() == [
        'ram = "3GiB"',
        'gpu = ["24GiB", "RTX 4090"]',
        "chat.max-new-tokens = 100",
        "generate.ignore-eos = true",
        'context = "7"  # QMIX_CONTEXT',
    ]
    assert qmix("config", "get", "ram").out == "3GiB\n"
    assert qmix("config", "get", "gpu").out == "24GiB\nRTX 4090\n"
    assert qmix("config", "get", "seed").status == 1
    assert qmix("config", "unset", "seed").status == 2
    assert qmix("config", "unset", "chat.max-new-tokens").status == 0
    assert "[chat]" not in file.read_text()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("rma", "1GiB"), "rma: not an option of any command; did you mean ram?"),
        (("chat.rma", "1GiB"), "chat.rma: not an option of chat; did you mean ram?"),
        (("ram", "2"), "ram: '2' is not a size: too few bytes; did you mean 2GiB?"),
        (("context", "many"), "context: 'many' is not a valid integer range."),
        (("dtype", "fp8"), "dtype: 'fp8' is not one of 'bf16', 'fp16'."),
        (("ram", "2GiB", "3GiB"), "ram: takes one value; quote a value with spaces"),
    ],
)
def test_config_set_refuses_what_no_command_would_take(qmix, file, argv, told):
    done = qmix("config", "set", *argv)
    assert (done.status, done.err) == (2, f"qmix: {told}\n")
    assert not file.exists()


def test_the_file_is_private_and_keys_are_not_shown(qmix, file):
    qmix("config", "set", "serve.api-key", "secret-key-1")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert qmix("config").out == 'serve.api-key = "(not shown)"\n'


def test_keys_are_listed_with_their_variables(qmix, file):
    rows = {line.split()[0]: line for line in qmix("config", "keys").out.splitlines()}
    assert re.search(r"QMIX_RAM +generate, chat, batch, serve", rows["ram"])
    assert "QMIX_MAX_NEW_TOKENS" in rows["max-new-tokens"]
    assert rows["log-file"].endswith("all commands")
    assert not {"json", "yes", "out", "verify"} & rows.keys()


def test_the_cache_is_where_it_is_set(qmix, first_use, file, tmp_path):
    assert qmix("ls", QMIX_CACHE=str(tmp_path / "mine")).err.startswith(f"no stores in {tmp_path / 'mine'}")
    assert qmix("config", "set", "cache", str(tmp_path / "other")).status == 0
    assert qmix("ls").err.startswith(f"no stores in {tmp_path / 'other'}")
    shutil.copytree(first_use.cache / "qmix", tmp_path / "other")
    made = qmix("pull", "tiny", "--precision", "int8", "--gpu", "none")  # by a process of its own
    assert made.status == 0, made.err
    assert list((tmp_path / "other").glob("tiny-int8-half-*/qmix.json"))


def test_quiet_says_nothing_beside_the_answer(qmix, file):
    done = qmix(*HELLO, "--quiet")
    assert (done.status, done.err) == (0, "")
    assert done.out
    assert qmix(*HELLO, QMIX_QUIET="1").err == ""
    assert qmix("generate", "Hello", "-m", "nobody", "-q").err.startswith("qmix: nobody: not found")


def test_verbose_tells_what_was_decided(qmix, file):
    done = qmix(*HELLO, "-v", QMIX_RAM="2GiB")
    assert "ram = 2GiB, set by QMIX_RAM" in done.lines
    assert any(line.startswith("store ") for line in done.lines)
    assert "set by" not in qmix(*HELLO, QMIX_RAM="2GiB").err


def test_a_log_file_has_everything_that_was_said_and_no_secret(qmix, file, tmp_path):
    log = tmp_path / "qmix.log"
    assert qmix(*HELLO, "-q", "--log-file", log).err == ""
    assert qmix("plan", "secret-token-1", "--log-file", log, HF_TOKEN="secret-token-1").status == 2
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) qmix", line) for line in lines), lines
    assert any("new tokens at" in line for line in lines)
    assert any("ERROR" in line and "***: not found" in line for line in lines)
    assert "secret" not in log.read_text()
    assert qmix(*HELLO, "--log-file", tmp_path / "no" / "log").status == 2


def test_a_command_with_settings_imports_nothing_heavy(qmix, file):
    write(file, 'ram = "1MB"\n')
    script = (
        "import sys, cli\nsys.argv = ['qmix', 'ls']\n"
        f"try: cli.main()\nfinally: print(sorted({HEAVY - {'rich'}} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


def test_two_edits_at_once_are_both_kept(qmix, file):
    edits = [("ram", "2GiB"), ("context", "128"), ("chat.seed", "7"), ("model", "tiny")]
    running = [subprocess.Popen([*COMMAND, "config", "set", *edit], env=os.environ) for edit in edits]
    assert [process.wait() for process in running] == [0] * len(edits)
    assert set(qmix("config").out.splitlines()) == {'ram = "2GiB"', "context = 128", "chat.seed = 7", 'model = "tiny"'}


@pytest.mark.parametrize("command", ["chat", "batch", "plan"])
def test_the_table_of_a_command_is_not_the_option_of_its_name(qmix, file, command):
    write(file, f'[{command}]\nram = "1GiB"\n')
    assert qmix(*HELLO).status == 0
    assert qmix("config").status == 0


def test_a_value_and_a_table_of_one_name_are_told_apart(qmix, file, tmp_path):
    write(file, "batch = 2\n")
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "x", "max_tokens": 1}\n')
    done = qmix("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-m", "tiny")
    assert done.status == 0, done.err
    refused = qmix("config", "set", "batch.ram", "8GiB")
    assert (refused.status, "batch is an option there, not a command" in refused.err) == (2, True)
    write(file, '[batch]\nram = "1GiB"\n')
    refused = qmix("config", "set", "batch", "2")
    assert (refused.status, "[batch] is the table of a command there" in refused.err) == (2, True)
    assert file.read_text() == '[batch]\nram = "1GiB"\n'
