"""The commands' two streams and exit codes when all is well."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from checkpoints import make_checkpoint
from command import COMMAND

from qmix.units import UnitSystem, format_bytes

NOTICE = "no model given: using the embedded tiny, a toy model\n"
MEASURING = "measuring the memory of Python: once, about 3 s\n"
PROGRESS = r"quantizing {}: [\d.]+ [kMG]?B of {}, \d+%(, [\d.]+ [kMG]?B/s)?(, \d+ s left)?\n"
DONE = r"quantizing {}: {} of {}, 100%, [\d.]+ [kMG]?B/s\n"
STATISTICS = (
    r"\d+ prompt tokens? in [\d.]+ s \([\d.]+ tok/s\), \d+ new tokens? at [\d.]+ tok/s, "
    r"[\d.]+% of experts in memory, [\d.]+ [kMG]?B read, peak \d+ MB of [\d.]+ [MGT]B, seed \d+\n"
)
PROMPT = "To install a package,"
SEEDED = ("generate", PROMPT, "-m", "tiny", "--seed", "1")
GREEDY = ("generate", PROMPT, "-m", "tiny", "--temperature", "0", "--ignore-eos", "--max-new-tokens", "24")
END_OF_TEXT = 2
RECORD_BYTES = 131072  # 3 * 256 * 320 weights of 4.25 bits, to the next multiple of 4096
HEAVY = {"torch", "transformers", "numba", "bitsandbytes", "accelerate", "huggingface_hub"}


def result(finished) -> dict:
    """The one JSON object of `generate --json`."""
    assert finished.status == 0, finished.err
    assert finished.out.count("\n") == 1
    return json.loads(finished.out)


@pytest.fixture(scope="module")
def greedy(commands, first_use) -> dict:
    return result(commands(*GREEDY, "--json", XDG_CACHE_HOME=str(first_use.cache)))


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("--help", 0),
        ("generate --help", 0),
        ("batch --help", 0),
        ("bench --help", 0),
        ("plan tiny", 0),
        ("plan --ram 1MB", 3),
        ("generate Hello --ram 1MB", 3),
        ("generate Hello -m nobody-has-this", 2),
        ("generate Hello --context 9999999", 2),
    ],
)
def test_what_computes_nothing_imports_nothing_heavy(qmix, command, status):
    script = (
        "import sys, cli\n"
        f"sys.argv = ['qmix', *{command.split()}]\n"
        "try: cli.main()\n"
        f"finally: print('imported:', sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize(("stdout", "status"), [("/dev/null", 2), ("/dev/full", 2)])
def test_it_ends_at_once_with_its_status_after_what_was_to_be_done_at_the_end(stdout, status, tmp_path):
    """Text that is still buffered is written, and what was registered for the end is done."""
    script = (
        "import atexit, pathlib, sys, cli\n"
        f"atexit.register(pathlib.Path({str(tmp_path / 'done')!r}).touch)\n"
        "sys.argv = ['qmix', 'generate', 'Hello', '-m', 'nobody-has-this']\n"
        "cli.run()\n"
        "pathlib.Path('never').touch()"
    )
    with open(stdout, "w") as out:  # noqa: PTH123 -- a device
        done = subprocess.run([sys.executable, "-c", script], stdout=out, cwd=tmp_path, check=False)
    assert done.returncode == status
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_a_text_that_could_not_be_written_at_the_end_is_a_failure():
    script = "import sys, cli\ncli.main = lambda: (print('Hello'), sys.exit(0))\ncli.run()"
    with open("/dev/full", "w") as out:  # noqa: PTH123 -- a device
        assert subprocess.run([sys.executable, "-c", script], stdout=out, check=False).returncode == 1


@pytest.mark.parametrize("line", ["config path", "plan mixtral-8x7b --compare none,24GiB"])
def test_a_result_for_a_closed_stdout_is_a_failure(line):
    script = f"{shlex.join(COMMAND)} {line} >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    told = "qmix: stdout: is closed; redirect it to a file, or to /dev/null"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told)


def test_help_names_every_command(qmix):
    done = qmix("--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("Usage: qmix [OPTIONS] COMMAND [ARGS]...\n")
    commands = re.findall(r"^  ([a-z]+)  ", done.out, re.MULTILINE)
    assert commands == [
        "generate",
        "chat",
        "batch",
        "serve",
        "pull",
        "quantize",
        "ls",
        "show",
        "rm",
        "verify",
        "export",
        "plan",
        "compare",
        "calibrate",
        "eval",
        "bench",
        "doctor",
        "config",
        "completion",
    ]


def test_first_use_says_what_is_made_ready_then_prints_the_text(qmix, first_use):
    done = first_use.finished
    title, size = "tiny, once", "29.8 MB"
    progress = f"({PROGRESS.format(title, size)})*{DONE.format(title, size, size)}"
    assert done.status == 0
    assert re.fullmatch(re.escape(NOTICE + MEASURING) + progress + STATISTICS, done.err), done.err
    assert done.out == result(qmix(*SEEDED, "--max-new-tokens", "24", "--json"))["text"] + "\n"


def test_later_uses_print_the_text_and_one_line_of_statistics(qmix, first_use):
    done = qmix("generate", PROMPT, "--seed", "1", "--max-new-tokens", "24")
    assert (done.status, done.out) == (0, first_use.finished.out)
    assert re.fullmatch(re.escape(NOTICE) + STATISTICS, done.err), done.err
    assert re.fullmatch(STATISTICS, qmix(*SEEDED, "--max-new-tokens", "2").err)


def test_the_embedded_model_needs_no_network_and_no_kernels_from_a_hub(first_use):
    assert first_use.finished.status == 0
    assert not first_use.log.exists()
    # and the trap does catch: who connects, and bitsandbytes imported as it comes
    for code in ("import socket; socket.create_connection(('192.0.2.1', 80), 1)", "import bitsandbytes"):
        subprocess.run([sys.executable, "-c", code], env=first_use.watched, capture_output=True, check=False)
    assert re.fullmatch(r"network: .*192.0.2.1.*\nget_kernel: kernels-community/.*\n", first_use.log.read_text())


def test_the_store_is_made_in_the_users_cache_and_nothing_elsewhere(first_use, commands, tmp_path):
    assert (first_use.store / "qmix.json").is_file()
    assert {path.name for path in first_use.home.iterdir()} == {"cache"}
    shutil.copytree(first_use.cache, tmp_path / ".cache")
    done = commands(*SEEDED, "--max-new-tokens", "24", HOME=str(tmp_path), XDG_CACHE_HOME="")
    assert (done.status, done.out) == (0, first_use.finished.out)
    assert re.fullmatch(STATISTICS, done.err)  # nothing was quantized


def test_json_is_one_object_with_every_field(qmix, first_use):
    found = result(qmix(*SEEDED, "--max-new-tokens", "24", "--json"))
    types = {name: type(value) for name, value in found.items()}
    assert types == {
        "text": str,
        "token_ids": list,
        "finish_reason": str,
        "seed": int,
        "usage": dict,
        "timings": dict,
        "memory": dict,
        "cache": dict,
    }
    assert found["text"] + "\n" == first_use.finished.out
    assert found["seed"] == 1
    usage, timings, memory, cache = (found[group] for group in ("usage", "timings", "memory", "cache"))
    assert usage == {"prompt_tokens": 6, "reused_tokens": 0, "completion_tokens": len(found["token_ids"])}
    assert set(timings) == {"ttft_s", "tpot_s", "total_s"}
    decoding = timings["tpot_s"] * (usage["completion_tokens"] - 1)
    assert 0 < timings["ttft_s"] < timings["ttft_s"] + decoding <= timings["total_s"] + 1e-9  # but for rounding
    assert set(memory) == {"peak_memory", "budget"}
    assert 10**8 < memory["peak_memory"] <= memory["budget"]
    assert cache == {"hits": cache["hits"], "misses": 0, "hit_rate": 1.0, "bytes_read": 0}
    assert cache["hits"] >= 6 * 2 * usage["completion_tokens"]  # two experts in each of six layers


def test_prompts_come_from_the_argument_a_dash_or_stdin(qmix):
    prompt = "L'élève ouvre la fenêtre → 窓"
    options = ("-m", "tiny", "--temperature", "0", "--max-new-tokens", "8")
    expected = qmix("generate", prompt, *options).out
    assert len(expected) > 5
    for argument in ([], ["-"]):
        done = qmix("generate", *argument, *options, stdin=prompt.encode() + b"\n")
        assert (done.status, done.out) == (0, expected)


def test_a_seed_fixes_the_text_and_a_drawn_one_is_told(qmix):
    options = ("generate", PROMPT, "-m", "tiny", "--max-new-tokens", "24", "--json")
    first, second = (result(qmix(*options)) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["token_ids"] != second["token_ids"]
    assert result(qmix(*options, "--seed", str(first["seed"])))["token_ids"] == first["token_ids"]


def test_temperature_zero_is_greedy_whatever_the_seed(qmix, greedy):
    for more in (["--seed", "7"], ["--temperature", "5", "--top-k", "1"]):
        assert result(qmix(*GREEDY, "--json", *more))["token_ids"] == greedy["token_ids"]


def test_sampling_options_take_effect(qmix, greedy):
    for options in (["--top-p", "0.000001"], ["--min-p", "1"]):  # both leave the likeliest token alone
        found = result(qmix(*GREEDY, "--json", "--temperature", "1", *options))
        assert found["token_ids"] == greedy["token_ids"]
    ids = result(qmix(*GREEDY, "--json", "--repetition-penalty", "100"))["token_ids"]
    assert len(set(ids)) == len(ids) > len(set(greedy["token_ids"]))


def test_text_ends_before_the_first_stop_sequence(qmix, greedy):
    text = greedy["text"]
    late, early = text[12:15], text[8:11]
    assert text.index(late) > text.index(early) > 0
    found = result(qmix(*GREEDY, "--json", "--stop", "not in the text", "--stop", late, "--stop", early))
    assert (found["text"], found["finish_reason"]) == (text[: text.index(early)], "stop")
    assert found["token_ids"] == greedy["token_ids"][: len(found["token_ids"])]
    assert qmix(*GREEDY, "--stop", early).out == text[: text.index(early)] + "\n"
    assert qmix(*GREEDY, "--stop", text[0]).out == "\n"
    whole = result(qmix(*GREEDY, "--json", "--stop", text + "and more"))  # all held back, then shown
    assert whole["text"] == text


def test_max_new_tokens_and_the_context_bound_the_answer(qmix):
    for option, value, tokens in (
        ("--max-new-tokens", 1, 1),
        ("--max-new-tokens", 7, 7),
        ("--context", 20, 14),
    ):
        found = result(qmix(*SEEDED, "--ignore-eos", "--json", option, str(value)))
        assert (found["usage"]["completion_tokens"], found["finish_reason"]) == (tokens, "length")


def test_ignore_eos_goes_on_after_the_end_of_text(qmix):
    options = ("generate", PROMPT, "-m", "tiny", "--temperature", "0", "--json")
    ended = result(qmix(*options))
    assert (ended["token_ids"][-1], ended["finish_reason"]) == (END_OF_TEXT, "stop")
    longer = len(ended["token_ids"]) + 5
    found = result(qmix(*options, "--ignore-eos", "--max-new-tokens", str(longer)))
    assert (len(found["token_ids"]), found["finish_reason"]) == (longer, "length")
    assert found["token_ids"][: len(ended["token_ids"])] == ended["token_ids"]


def test_the_smallest_budget_gives_the_same_text(qmix, greedy):
    smallest = json.loads(qmix("plan", "tiny", "--json").out)["smallest"]
    found = result(qmix(*GREEDY, "--json", "--ram", str(smallest)))
    assert found["token_ids"] == greedy["token_ids"]
    assert found["memory"]["budget"] == smallest
    assert found["cache"]["misses"] > 0
    assert found["cache"]["bytes_read"] == found["cache"]["misses"] * RECORD_BYTES


def test_plan_shows_what_lies_where_and_it_adds_up(qmix, monkeypatch):
    monkeypatch.setattr(UnitSystem, "binary", True)  # as --ram is typed
    options = ("plan", "tiny", "--ram", "2GiB", "--context", "512")
    table, found = qmix(*options, FORCE_COLOR="1"), json.loads(qmix(*options, "--json").out)
    assert (table.status, table.err) == (0, "")
    rows = dict(re.findall(r"^│ (.+?) +│ +([\d.]+ [KMG]iB) │", table.out, re.MULTILINE))
    assert rows == {
        "Python with its imports": format_bytes(found["interpreter"]),
        "dense weights": format_bytes(found["dense"]),
        "KV cache, 512 tokens": format_bytes(2 * 6 * 2 * 32 * 2 * 512),
        "work space": format_bytes(found["work"]),
        "experts": format_bytes(48 * RECORD_BYTES),
        "predicted peak": format_bytes(found["total"]),
        "headroom": format_bytes(2 * 2**30 - found["total"]),
        "budget": format_bytes(2 * 2**30),
    }
    parts = ("interpreter", "dense", "kv_cache", "work", "pool")
    assert found["total"] == sum(found[part] for part in parts)
    assert (found["fits"], found["schema"]) == (True, "qmix-plan-4")
    assert found["on_disk"] + found["pool"] == sum(found["expert_bytes"].values())
    assert table.out.count("r") > 48  # every expert's cell
    assert table.out.endswith("run it:\n  qmix generate -m tiny --ram 2048MiB --context 512\n")


def test_plan_refuses_what_does_not_fit_and_its_smallest_budget_is_exact(qmix):
    refused = qmix("plan", "tiny", "--ram", "100MiB", "--context", "64")
    assert refused.status == 3
    told = re.fullmatch(r"qmix: does not fit 100 MiB of RAM: needs .* --ram (\d+)MiB\n", refused.err)
    assert told, refused.err
    assert refused.out.startswith("tiny: the nearest plan that fits")
    assert refused.out.endswith(f"  qmix generate -m tiny --ram {told[1]}MiB --context 64\n")
    options = ("plan", "tiny", "--context", "64", "--json", "--ram")
    accepted, less = qmix(*options, f"{told[1]}MiB"), qmix(*options, f"{int(told[1]) - 1}MiB")
    assert accepted.status == 0
    assert less.status == 3
    answer = json.loads(less.out)
    assert json.loads(qmix(*options, str(answer["smallest"])).out)["slots"] == 2
    assert qmix(*options, str(answer["smallest"] - 1)).status == 3
    nearest = answer.pop("nearest")
    assert answer == {"schema": "qmix-plan-4", "fits": False, "smallest": answer["smallest"]}
    assert nearest["ram"] == int(told[1]) * 2**20
    assert nearest["fits"]
    assert math.ceil(answer["smallest"] / 2**20) == int(told[1])
    assert qmix(*SEEDED, "--context", "64", "--ram", "100MiB").err == refused.err


def test_quantizing_shows_plain_lines_and_again_it_is_already_there(qmix, tmp_path):
    model, store = make_checkpoint(tmp_path / "model", shards=2), tmp_path / "store"
    title, size = re.escape(str(model)), "469 kB"
    first = qmix("quantize", model, store, FORCE_COLOR="1")  # as many a log has it
    progress = f"({PROGRESS.format(title, size)})*{DONE.format(title, size, size)}"
    assert (first.status, first.out) == (0, "")
    assert re.fullmatch(f"{progress}{re.escape(str(store))}: 221 kB\n", first.err), first.err
    written = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    again = qmix("quantize", model, store)
    assert (again.status, again.out, again.err) == (0, "", f"{store}: already there, 221 kB\n")
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == written


def test_odd_names_are_names_like_any_other(qmix, tiny, tmp_path, first_use):
    model, store = tmp_path / "[red] [" / "b] é 'q'", tmp_path / "a [blue] store 窓"  # no markup
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("recipe"))
    (tmp_path / "link").symlink_to(store)
    assert qmix("quantize", model.relative_to(tmp_path), store.name, cwd=tmp_path).status == 0
    for argv in ([store], [tmp_path / "link"], ["link"]):
        done = qmix("generate", PROMPT, "--seed", "1", "--max-new-tokens", "24", "-m", *argv, cwd=tmp_path)
        assert (done.status, done.out) == (0, first_use.finished.out)
    inside = qmix("generate", PROMPT, "--seed", "1", "--max-new-tokens", "24", "-m", ".", cwd=store)
    assert (inside.status, inside.out) == (0, first_use.finished.out)
    title = qmix("plan", model.relative_to(tmp_path), cwd=tmp_path).out.splitlines()[0]
    assert title.rstrip() == "[red] [/b] é 'q'"


def test_a_locale_without_a_character_shows_a_question_mark(qmix, tiny, tmp_path):
    (tmp_path / "→é").symlink_to(tiny)
    done = subprocess.run(
        [sys.executable, "-m", "cli", "plan", tmp_path / "→é"],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("latin-1").splitlines()[0].rstrip().endswith("?é")
