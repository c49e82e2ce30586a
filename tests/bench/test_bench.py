"""`qmix bench`: its output, and the consistency of its figures."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from command import Finished
from test_cli import NOTICE, RECORD_BYTES

import qmix as package
from qmix.bench.measure import measure, prepare, random_prompt
from qmix.bench.roofline import Workload
from qmix.engine.stream import Runner
from qmix.errors import UsageError
from qmix.machine import probes
from qmix.machine.ceilings import Ceilings
from qmix.machine.probes import Rate

MEASURING = "measuring the memory and cores of this machine\n"
FIELDS = {
    "test": str,
    "prompt_tokens": int,
    "decode_steps": int,
    "rate": float,
    "rate_sd": float,
    "ttft_s": float,
    "tpot_s": float,
    "hit_rate": float,
    "bytes_per_token": float,
    "least_bytes_per_token": float,
    "bound_rate": float,
    "bound_by": str,
    "share_of_bound": float,
    "samples": list,
}


def progress(name: str, repetitions: int) -> str:
    lines = [rf"{name}: {index} of {repetitions}, [\d.]+ tok/s\n" for index in range(1, repetitions + 1)]
    return f"{name}: warming up\n" + "".join(lines)


@pytest.fixture(scope="module")
def smallest(commands, first_use) -> int:
    cache = {"XDG_CACHE_HOME": str(first_use.cache)}
    return json.loads(commands("plan", "tiny", "--context", "26", "--json", **cache).out)["smallest"]


@pytest.fixture(scope="module")
def tight(commands, first_use, smallest) -> Finished:
    """Return a benchmark under a budget for two experts."""
    argv = ("bench", "tiny", "-p", "24,5", "-n", "9", "-r", "2", "--ram", str(smallest), "--json")
    return commands(*argv, XDG_CACHE_HOME=str(first_use.cache))


@pytest.fixture(scope="module")
def report(tight) -> dict:
    assert tight.status == 0, tight.err
    assert tight.out.count("\n") == 1
    return json.loads(tight.out)


def test_progress_goes_to_stderr(tight):
    expected = MEASURING + "".join(progress(name, 2) for name in ("pp24", "pp5", "tg9"))
    assert re.fullmatch(expected, tight.err), tight.err


def test_json_has_the_conditions(report, smallest):
    assert (report["schema"], report["model"], report["precision"], report["dtype"]) == (
        "qmix-bench-1",
        "tiny",
        "nf4",
        "bf16",
    )
    assert (report["budget"], report["context"]) == (smallest, 26)  # as chosen for 16 + 1 + 9 tokens
    assert (report["slots"], report["num_records"]) == (2, 48)
    assert 10**8 < report["peak_memory"] <= smallest
    assert report["threads"] >= 1
    assert report["cpu"]
    assert set(report["versions"]) == {"qmix", "python", "torch", "bitsandbytes", "transformers"}
    assert set(report["ceilings"]) == {"memory_read", "disk_read", "matmul"}
    assert len(report["ceilings"]["disk_read"]["rounds"]) == 3 * 2 + 1  # before, between and after
    for rate in report["ceilings"].values():
        assert min(rate["rounds"]) <= rate["median"] <= max(rate["rounds"])


def test_json_rows_have_every_field(report):
    assert [row["test"] for row in report["rows"]] == ["pp24", "pp5", "tg9"]
    for row in report["rows"]:
        decode = row["test"] == "tg9"
        assert {name: type(value) for name, value in row.items()} == FIELDS | ({} if decode else {"tpot_s": type(None)})
        assert (row["prompt_tokens"], row["decode_steps"]) == (16, 9) if decode else (int(row["test"][2:]), 0)
        assert len(row["samples"]) == 2


def test_figures_agree_with_one_another(report):
    rates = {name: rate["median"] for name, rate in report["ceilings"].items()}
    for row in report["rows"]:
        samples, tokens = row["samples"], row["decode_steps"] or row["prompt_tokens"]
        for sample in samples:
            seconds = sample["tpot_s"] or sample["ttft_s"] / tokens
            assert sample["rate"] * seconds == pytest.approx(1)
            cost = sample["cost"]
            times = (cost["disk_bytes"] / rates["disk_read"], cost["memory_bytes"] / rates["memory_read"])
            assert sample["bound_s"] == pytest.approx(max(*times, cost["flops"] / rates["matmul"]))
        for name in ("rate", "ttft_s", "hit_rate"):
            assert row[name] == pytest.approx(statistics.mean(sample[name] for sample in samples))
        assert row["rate_sd"] == pytest.approx(statistics.stdev(sample["rate"] for sample in samples))
        taken = [sample["tpot_s"] or sample["ttft_s"] for sample in samples]
        shares = [sample["bound_s"] / seconds for sample, seconds in zip(samples, taken, strict=True)]
        assert row["share_of_bound"] == pytest.approx(statistics.mean(shares))
        mean_bound = statistics.mean(sample["bound_s"] for sample in samples)
        assert row["bound_rate"] * mean_bound == pytest.approx(1 if row["decode_steps"] else tokens)


def test_reads_are_those_of_the_timed_part(report):
    for row in report["rows"]:
        for sample in row["samples"]:
            assert sample["bytes_read"] % RECORD_BYTES == 0
        read = row["bytes_per_token"]
        assert 0 < row["least_bytes_per_token"] <= read
        if row["test"] == "tg9":  # two experts in each of six layers
            assert (1 - row["hit_rate"]) * 12 * RECORD_BYTES <= read * (1 + 1e-9)
            assert row["least_bytes_per_token"] <= 12 * RECORD_BYTES
        else:  # each of the 48 once
            assert read * row["prompt_tokens"] <= 48 * RECORD_BYTES * 1.5


def test_the_table_shows_rows_and_conditions(qmix):
    done = qmix("bench", "-p", "8", "-n", "4", "-r", "1", "--ram", "1GiB")
    assert done.status == 0, done.err
    assert done.err.startswith(NOTICE + MEASURING)
    number = r"[\d.]+(?:e\+\d+)?"
    rows = re.findall(
        rf"^(\w+) +({number}) ± (0\.?0*) +{number} m?s +(?:{number} m?s +)?100.0% +0 B +{number}% *$",
        done.out,
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == ["pp8", "tg4"]
    names = [line.split("  ")[0] for line in done.out.splitlines()]
    assert names[:7] == ["model", "memory", "experts", "machine", "versions", "memory read", "matmul"]  # no disk
    assert re.search(r"^memory +1 GiB budget, peak \d+ MiB *$", done.out, re.MULTILINE)
    assert re.search(r"^experts +48 of 48 fit in memory; context 21 *$", done.out, re.MULTILINE)
    assert re.search(r"^bound +tg4 after a prompt of 16: [\d.]+ tok/s, set by memory *$", done.out, re.MULTILINE)


@pytest.fixture(scope="module")
def runner(tmp_path_factory, first_use):
    store, plan = prepare(first_use.store, [Workload(7), Workload(3, 4)], ram="2GiB")
    with Runner(store, plan) as runner:
        yield runner


@pytest.fixture
def ceilings() -> Ceilings:
    return Ceilings(Rate((1e10,), "given"), None, Rate((1e12,), "given"))


def test_prompts_are_random_ordinary_tokens_and_always_the_same(runner):
    prompts = [random_prompt(runner, 3000, seed) for seed in (0, 1)]
    assert prompts[0] == random_prompt(runner, 3000, 0) != prompts[1]
    assert len(set(prompts[0])) > 1000
    assert not set(runner.tokenizer.all_special_ids).intersection(*prompts)
    assert 0 <= min(prompts[0]) <= max(prompts[0]) < runner.store.geometry.vocab_size


def test_a_runner_of_ones_own_is_measured_and_left_as_it_was(runner, ceilings):
    told: list[str] = []
    get, hooks = runner.pool.get, len(runner.model._forward_pre_hooks)
    found = measure(runner, [Workload(3, 4)], 2, ceilings, told.append)
    assert (runner.pool.get, len(runner.model._forward_pre_hooks)) == (get, hooks)
    assert len(told) == 3
    (row,) = found.rows
    assert (row.hit_rate, row.bytes_per_token, row.bound_by) == (1.0, 0.0, "memory")
    assert found.ceilings == ceilings
    kv = 6 * runner.store.geometry.kv_bytes_per_token  # 4, 5, 6 and 7 positions are 5.5 on average
    least = 12 * RECORD_BYTES + kv * 5.5 / 6
    assert row.samples[0].cost.memory_bytes > least
    with pytest.raises(UsageError, match="pp8: takes a context of 9, and the runner's is 8; load the model with"):
        measure(runner, [Workload(8)], 1, ceilings)


def test_a_large_pool_is_its_own_memory_probe(runner, ceilings, monkeypatch):
    monkeypatch.setattr("qmix.bench.measure.MEMORY_BYTES", runner.pool.memory.nbytes)
    found = measure(runner, [Workload(7)], 2, ceilings)
    assert len(found.ceilings.memory_read.rounds) == 3
    assert found.ceilings.memory_read.how in probes.MemoryProbe(runner.pool.memory)._ways
    assert found.ceilings.matmul == ceilings.matmul


def test_the_version_reported_is_this_one(report):
    assert report["versions"]["qmix"] == package.__version__
