"""Budgets against what processes really take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from command import LIMIT_SECONDS
from stores import make_store

pytestmark = pytest.mark.usefixtures("measured")
PROMPT = "To install a package on this system, open a terminal and type the name. " * 40


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("memory") / "store")


def qmix_json(*arguments: str, prefix: tuple[str, ...] = ()) -> dict:
    command = [*prefix, sys.executable, "-m", "cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("mixed") / "store", "nf4,*.7=int8,2.*=half")


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("half") / "store", "half")


@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("store", ("--ram", "4GiB", "--context", "2048")),
        ("store", ("--ram", "4GiB", "--context", "720", "--attn", "eager")),
        ("store", ("--ram", "{smallest}", "--context", "1024")),
        ("mixed", ("--ram", "4GiB", "--context", "1024")),
        ("mixed", ("--ram", "{smallest}", "--context", "1024")),
        ("half", ("--ram", "4GiB", "--context", "1024")),
    ],
    ids=["roomy", "eager attention", "smallest pool", "mixed", "mixed, smallest pool", "half"],
)
def test_the_plans_total_is_the_runs_peak(which, options, request):
    """Within 5%, and never above the budget."""
    store = request.getfixturevalue(which)
    if "{smallest}" in options:
        planned = qmix_json("plan", str(store.directory), "--ram", "4GiB", *options[2:])
        options = ("--ram", str(planned["smallest"]), *options[2:])
    planned = qmix_json("plan", str(store.directory), *options)
    ran = qmix_json("generate", PROMPT, "-m", str(store.directory), *options, "--max-new-tokens", "30", "--ignore-eos")
    peak = ran["memory"]["peak_memory"]
    assert peak == pytest.approx(planned["total"], rel=0.05)
    assert peak <= planned["ram"]


def test_a_program_of_the_users_stays_within_the_plan_too(store, tmp_path):
    """It imports transformers whole, which takes more than a command does. A plan file that counts less is refused."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(qmix_json("plan", str(store.directory), "--ram", "400MiB")))
    script = f"""
import json, qmix
from pathlib import Path
from qmix.plan.file import read_plan
with qmix.load({str(store.directory)!r}, ram="4GiB") as runner:
    result = runner.complete({PROMPT!r}, max_new_tokens=30, ignore_eos=True)
try:
    refused = qmix.load({str(store.directory)!r}, plan=read_plan(Path({str(plan)!r}))).close()
except qmix.UsageError as error:
    refused = str(error)
print(json.dumps([runner.plan.total, result.peak_memory, refused]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total, peak, refused = json.loads(done.stdout)
    assert peak == pytest.approx(total, rel=0.05)
    assert peak <= total * 1.01
    assert "Python takes" in refused


def test_a_short_runs_peak_is_the_plans_too(tiny, tmp_path):
    """Pool and cache are taken at once, not as they are first used: here a pool of half of 132 MB of experts."""
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 3, "num_local_experts": 8}
    config = TINY_CONFIG | sizes | {"vocab_size": 4096}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", random_weights(config), config, tokenizer=tiny)
    store = str(make_store(checkpoint, tmp_path / "store", "half").directory)
    whole = qmix_json("plan", store, "--ram", "4GiB")
    ram = ("--ram", str(whole["smallest"] + whole["pool"] // 2))
    planned = qmix_json("plan", store, *ram)
    assert 10 <= planned["slots"] <= 14
    ran = qmix_json("generate", "Hello", "-m", store, *ram, "--max-new-tokens", "1")
    assert ran["memory"]["peak_memory"] == pytest.approx(planned["total"], rel=0.05)


@pytest.fixture
def cgroup_of():
    """Gives the command prefix that runs a command with its memory, page cache included, held to some bytes."""
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" if (root / "memory").is_dir() else root
    group = parent / f"qmix-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no permission to make a cgroup")

    def prefix(limit: int) -> tuple[str, ...]:
        name = "memory.limit_in_bytes" if parent != root else "memory.max"
        if not (group / name).exists():
            pytest.skip("no memory controller")
        (group / name).write_text(str(limit))
        return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")

    yield prefix
    group.rmdir()


def test_a_run_completes_under_a_hard_limit_of_its_budget(store, cgroup_of):
    planned = qmix_json("plan", str(store.directory), "--ram", "4GiB", "--context", "1024")
    smallest = planned["smallest"]
    ran = qmix_json(
        *("generate", PROMPT, "-m", str(store.directory), "--ram", str(smallest), "--context", "1024"),
        *("--max-new-tokens", "30", "--ignore-eos", "--temperature", "0"),
        prefix=cgroup_of(smallest),
    )
    assert ran["usage"]["completion_tokens"] == 30
    assert ran["cache"]["misses"] > 0


LONG = b"To install a package, open it. " * 50_000  # 1.5 MB, which take 300 MB and more to tokenise at once


@pytest.fixture
def smallest(qmix, store) -> int:
    """By what is kept of Python's own memory in the cache that the commands have: measuring it counts as theirs."""
    return json.loads(qmix("plan", store.directory, "--ram", "4GiB", "--json").out)["smallest"]


def refused(done, smallest: int, *told: str) -> None:
    """Each in a line of its own, within the smallest budget that the model can have."""
    assert [line for line in done.lines if "too long" in line or "longer than" in line or "larger than" in line] == [
        f"qmix: {line}" for line in told
    ]
    assert 2e8 < done.peak < smallest


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LONG, "the prompt is 1550000 bytes, too long for a context of 2048, the model's longest; shorten it"),
        (b"a" * 34_000, "the prompt is 34000 bytes, too long for a context of 2048, the model's longest; shorten it"),
        (b"x" * 100_000_000, "stdin: longer than 4194304 bytes, more than any context holds; shorten it"),
    ],
    ids=["1.5 MB", "34 kB of a letter", "100 MB"],
)
def test_a_prompt_of_any_length_is_refused_within_the_budget(qmix, store, smallest, text, told):
    done = qmix("generate", "-m", store.directory, "--ram", str(smallest), stdin=text)
    assert done.status == 2
    refused(done, smallest, told)


def test_a_chat_takes_turns_and_files_of_any_length_within_the_budget(qmix, store, smallest, tmp_path):
    (tmp_path / "long").write_bytes(LONG)
    turns = (f"/read {tmp_path}/long", "/read /dev/zero", "Hello")
    stdin = LONG + b"\n" + b'"""' + LONG.replace(b". ", b"\n") + b'"""\n' + "\n".join(turns).encode()
    done = qmix("chat", store.directory, "--ram", str(smallest), "--max-new-tokens", "5", stdin=stdin)
    assert (done.status, len(done.out) > 5) == (1, True)
    refused(
        done,
        smallest,
        "stdin: a line is longer than 65536 bytes, more than the context holds; shorten it",
        "stdin: a turn is longer than 65536 bytes, more than the context holds; shorten it",
        "this turn is 1550000 bytes, too long for a context of 2048, the model's longest; shorten it",
        "/read /dev/zero: larger than 4194304 bytes; give a text file of at most 4 MiB",
    )


def test_a_long_line_of_a_batch_takes_no_more_memory_than_a_short_one(qmix, store, tmp_path):
    short, long = {"id": "short", "prompt": "Hello", "max_tokens": 2}, {"id": "long", "prompt": LONG.decode()}
    peaks = []
    for number, lines in enumerate(([short], [long, short, long | {"id": "again"}])):
        source, output = tmp_path / f"in-{number}", tmp_path / f"out-{number}"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = qmix("batch", source, "-o", output, "-m", store.directory, "--ram", "4GiB", "--json")
        answers = {answer["custom_id"]: answer for answer in map(json.loads, output.read_text().splitlines())}
        assert answers["short"]["error"] is None
        peaks.append(json.loads(done.out)["peak_memory"])
    assert "the prompt is 1550000 bytes, too long" in answers["long"]["error"]["message"]
    assert peaks[1] < peaks[0] + 30e6


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"id": "a", "prompt": "' + b"x" * 100_000_000 + b'"}', "line 1: longer than 4194304 bytes"),
        (b"".join(b'{"id": "%s%d", "prompt": "x"}\n' % (b"x" * 100_000, number) for number in range(500)),
         "line 1: the id is 100001 bytes; give one of at most 512"),
        (b'{"id": "a", "prompt": "x", "zzz": ' + b"[[]," * 1_000_000 + b"0" + b"]" * 1_000_000 + b"}", "line 1: "),
    ],
    ids=["a line of 100 MB", "ids of 100 kB", "4 MB of nested lists"],
)  # fmt: skip
def test_a_file_of_requests_is_looked_at_in_little_memory(qmix, store, smallest, tmp_path, content, told):
    (tmp_path / "in").write_bytes(content)
    done = qmix("batch", tmp_path / "in", "-o", tmp_path / "out", "-m", store.directory)
    assert (done.status, told in done.err) == (2, True), done.err[:1000]
    assert 2e8 < done.peak < smallest
