"""The script that measures on GPUs, without one: what it runs, what a failed step leaves, its watch, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import LIMIT_SECONDS
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_llamacpp
import gpu_needs
import gpu_report
import gpu_steps
from gpu_steps import StepError, Steps
from synthetic_store import write_store
from synthetic_weights import PRESETS, SyntheticModel

from qmix.geometry import Geometry

GIB = 2**30
CARD = "NVIDIA GeForce RTX 4090, {total}, {free}, {used}, 580.10, 8.9"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program in nvidia-smi's place: the file it returns has the MiB in use of a card of 24 GiB."""
    used = tmp_path / "used"
    used.write_text("500\n")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    card = CARD.format(total=24564, free=23900, used=500)
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*loop-ms*) while true; do echo "0, GPU-abc, $(cat {used})"; sleep 0.02; done;;\n'
        f"*name*) echo '{card}';;\n"
        f"*) cat {used};;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return used


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, gpu.__file__, str(tmp_path / "there")]
    bare = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=bare, check=False)
    assert done.returncode == 1
    assert "Error: needs an NVIDIA GPU with its driver, and torch for CUDA" in done.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("free", "ram", "names"),
    [
        ((79.2,), 128, ["8x7b, 40GiB", "8x7b, 24GiB", "8x7b, 12GiB", "8x22b, 24GiB", "8x7b, CPU alone"]),
        ((79.2,), 64, ["8x7b, 40GiB", "8x7b, 24GiB", "8x7b, 12GiB", "8x7b, CPU alone"]),
        ((23.3,), 128, ["8x7b, 23GiB", "8x7b, 12GiB", "8x22b, 23GiB", "8x7b, CPU alone"]),
        ((7.7,), 128, ["8x7b, 7680MiB", "8x7b, CPU alone"]),
        ((15.6, 15.6), 64, ["8x7b, 15872MiB", "8x7b, 12GiB", "8x7b, 12GiB + 12GiB", "8x7b, CPU alone"]),
    ],
)
def test_what_is_run_follows_from_the_memory(free, ram, names):
    """A card has less than its nominal size free: then all of it, to half a GiB, is a budget, too."""
    given = [int(each * GIB) for each in free]
    assert [case.name for case in gpu.cases((), given, ram * GIB, True)] == names
    assert "8x22b" not in " ".join(case.name for case in gpu.cases((), given, ram * GIB, False))


def test_budgets_that_were_asked_for():
    asked = gpu.cases(("8GiB", "6GiB+6GiB", "24GiB"), [12 * GIB] * 2, 32 * GIB, True)
    assert [case.options for case in asked] == [
        ["--gpu", "8GiB"], ["--gpu", "6GiB", "--gpu", "6GiB"], ["--gpu", "none"]
    ]  # fmt: skip


def test_gpus_are_read_from_nvidia_smi(nvidia_smi, monkeypatch):
    (found,) = gpu_steps.gpus()
    assert (found["name"], found["free"]) == ("NVIDIA GeForce RTX 4090", 23900 * 2**20)
    monkeypatch.setattr(gpu_steps, "smi", lambda *_: [["NVIDIA GB10", "[N/A]", "[N/A]", "[N/A]", "580.1", "12.1"]])
    assert gpu_steps.gpus()[0]["free"] is None  # a GPU without memory of its own


def test_a_gpu_has_its_place_among_the_visible_ones():
    assert gpu_steps.place_of("1", ["GPU-b"], None) == 1
    assert gpu_steps.place_of("1", ["GPU-b"], "1,0") == 0
    assert gpu_steps.place_of("1", ["GPU-b"], "GPU-b") == 0
    assert gpu_steps.place_of("2", ["GPU-c"], "1,0") is None


def test_the_peak_is_above_what_was_in_use_before(nvidia_smi):
    """The watch skips lines that are messages."""
    nvidia_smi.write_text("500\nUnable to determine the device handle\n\n")
    with gpu_steps.Peak() as peak:
        nvidia_smi.write_text("12500\n")
        until = time.monotonic() + LIMIT_SECONDS
        while peak.nbytes != [12000 * 2**20] and time.monotonic() < until:
            time.sleep(0.01)
        nvidia_smi.write_text("600\n")
    assert peak.nbytes == [12000 * 2**20]


def test_an_nvidia_smi_without_numbers_costs_no_result(nvidia_smi):
    nvidia_smi.write_text("[N/A]\n")
    with gpu_steps.Peak() as peak:
        time.sleep(0.1)
    assert peak.nbytes == []


def fails(limit: float) -> None:
    raise KeyError("what")


def test_a_step_that_fails_loses_no_other_and_is_tried_again(tmp_path):
    path, said = tmp_path / "results.json", []
    steps = Steps(path, {"gpu": "a"}, 100, said.append)
    assert steps.take("good", 5, lambda limit: limit) == 5
    assert steps.take("bad", 5, fails) is None
    assert steps.take("bad", 5, lambda limit: 1) is None  # once a run
    assert json.loads(path.read_text())["results"] == {"good": 5}
    assert steps.errors == {"bad": "'what'"}
    again = Steps(path, {"gpu": "a"}, 100, said.append)
    assert again.take("good", 5, fails) == 5
    assert again.take("bad", 5, lambda limit: 2) == 2
    other = Steps(path, {"gpu": "b"}, 100, said.append)  # another machine's results are moved away
    assert other.results == {}
    assert len(list(tmp_path.glob("results-*.json"))) == 1


def test_what_the_time_does_not_allow_is_left_and_a_step_gets_what_is_left(tmp_path):
    steps = Steps(tmp_path / "results.json", {}, 50, lambda line: None)
    assert 40 < steps.take("short", 500, lambda limit: limit) <= 50
    late = Steps(tmp_path / "other.json", {}, 5, lambda line: None)
    assert late.take("late", 500, lambda limit: limit) is None
    assert late.left == ["late"]


def test_a_step_ends_with_its_whole_family(tmp_path):
    program = f"import subprocess, sys; subprocess.Popen(['sleep', '61.25']); print('begun', flush=True); {WAIT}"
    with pytest.raises(StepError, match="not done after 8 s; it had printed: begun"):
        gpu_steps.python("-c", program, limit=8)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 61.25" not in running


WAIT = "import time; time.sleep(60)"


def test_packages_that_are_missing_or_of_another_version():
    assert not gpu_needs.unmet(gpu_needs.needed())[0]
    assert any(each.startswith("torch>=") for each in gpu_needs.needed())
    missing, others = gpu_needs.unmet(["nothing-of-that-name>=1", "torch<1", "click>=8"])
    assert missing == ["nothing-of-that-name"]
    assert [each.split()[0] for each in others] == ["torch"]


LLAMA_BENCH = json.dumps(
    [{"n_prompt": 512, "n_gen": 0, "avg_ts": 6479.2, "stddev_ts": 3.0}, {"n_prompt": 0, "n_gen": 64, "avg_ts": 179.1}]
)


def test_llama_bench_is_read_and_kept_within_the_budget():
    assert gpu_llamacpp.figures(f"ggml_cuda_init: found 1\n{LLAMA_BENCH}\n") == {"prefill": 6479.2, "decode": 179.1}
    with pytest.raises(StepError, match="no JSON: error: invalid parameter"):
        gpu_llamacpp.figures("error: invalid parameter for argument: -ncmoe")
    tried = []

    def once(layers):
        tried.append(layers)
        return {"peak": [(30 - layers) * GIB]}

    assert gpu_llamacpp.within(once, 5, 24 * GIB)["peak"] == [24 * GIB]
    assert tried == [5, 6]
    with pytest.raises(StepError, match="8 layers"):
        gpu_llamacpp.within(once, 5, 20 * GIB)


def test_layers_that_llama_cpp_leaves_on_the_host():
    """Trials on an H100 found 7 in 24 GiB with a larger context, and 21 in 12 GiB."""
    dense, cache = 3_200_000_000, 80_000_000
    assert gpu_llamacpp.layers_on_host(40 * GIB, PRESETS["8x7b"], dense, cache) == 0
    assert 5 <= gpu_llamacpp.layers_on_host(24 * GIB, PRESETS["8x7b"], dense, cache) <= 7
    assert 20 <= gpu_llamacpp.layers_on_host(12 * GIB, PRESETS["8x7b"], dense, cache) <= 22


def results(rate: float) -> dict:
    """Return what a run finds of a case with all experts on the GPU."""
    rows = [
        {"test": "tg64", "rate": rate, "bound_rate": 250.0, "share_of_bound": rate / 250},
        {"test": "pp512", "rate": 7000.0, "bound_rate": 9000.0, "share_of_bound": 7 / 9},
    ]
    predicted = {"decode": {"tokens_per_s": 181.0}, "prefill": {"tokens_per_s": 5750.0}}
    plan = {"predicted": predicted, "num_records": 256, "host_records": 0, "devices": [{}]}
    return {
        "bench of 8x7b, 40GiB": {"rows": rows, "peak": [29000 * 2**20]},
        "plan of 8x7b, 40GiB": plan,
        "batch of 8x7b, 40GiB": {"tok_s": 1500.0},
        "llama.cpp of 8x7b, 40GiB": {"prefill": 6479.2, "decode": 179.1, "peak": [27000 * 2**20], "host_layers": 0},
    }


def test_tables_and_goals_of_whatever_is_known():
    case = gpu.Case("8x7b", (40 * GIB,))
    assert gpu_report.row(results(190.0), case.name) == [
        "8x7b, 40GiB", "190", "181", "250", "76%", "7000", "5750", "9000", "78%", "1500", "256 of 256", "29000 MiB", ""
    ]  # fmt: skip
    assert gpu_report.row({}, case.name) == [case.name, *[""] * 12]
    lines = gpu_report.goals(results(190.0), {case.name: case.budgets})
    assert [line.split()[0] for line in lines] == ["reached", "missed", "reached", "missed"]
    assert lines[1] == "missed   8x7b, 40GiB: decode, of llama.cpp's: 1.06x, wanted 1.10x"
    assert gpu_report.within_budgets(results(190.0), {case.name: (20 * GIB,)})[0].startswith("OVER BUDGET")
    shown = Console(width=200)
    with shown.capture() as capture:
        shown.print(gpu_report.table(results(190.0), [case.name]))
        shown.print(gpu_report.peer_table(results(190.0), [case.name]))
    assert "nvidia-smi's" in capture.get()
    assert "179.1" in capture.get()


def test_a_report_names_failures_and_what_is_left(capsys):
    found = results(190.0) | {"self-test": {"passed": False, "lines": ["ok: one", "FAILED: logits", "ok: two"]}}
    steps = SimpleNamespace(results=found, errors={"text of 8x7b, 40GiB": "why"}, left=["kernels"])
    gpu_report.report(steps, [gpu.Case("8x7b", (40 * GIB,))])
    lines = capsys.readouterr().out.splitlines()
    last = ["self-test: FAILED", "FAILED: logits", "failed: text of 8x7b, 40GiB: why"]
    assert lines[-4:] == [*last, "no time left for: kernels (run the same command again)"]


@pytest.mark.slow
def test_a_run_whose_gpu_fails_has_the_cpus_row_and_llama_cpps(nvidia_smi, tmp_path, monkeypatch):
    """Everything but the GPU, with a small store in the large one's place: the steps, the tables, the file."""
    there = tmp_path / "there"
    write_store(there / "8x7b", SyntheticModel(Geometry(256, 448, 4, 4, 2, 64, 8, 2, 4096, 4096)))
    (there / "8x7b.gguf").write_bytes(b"GGUF")
    program = tmp_path / "bin" / "llama-bench"
    program.write_text(f"#!/bin/sh\necho '{LLAMA_BENCH}'\n")
    program.chmod(0o755)
    command = [sys.executable, gpu.__file__, str(there), "--budget", "12GiB", "--no-large", "--no-self-test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    found = json.loads((there / "results.json").read_text())
    assert done.returncode == 1
    assert "bench of 8x7b, 12GiB: failed: " in done.stderr
    assert "torch finds 0 of 1 GPUs" in done.stderr
    assert "torch finds no GPU here" in found["errors"]["bench of 8x7b, 12GiB"]
    assert found["results"]["text of 8x7b, CPU alone"] == {"right": gpu_steps.TEXT}
    assert {row["test"] for row in found["results"]["bench of 8x7b, CPU alone"]["rows"]} == {"tg64", "pp512"}
    assert "CPU alone" in done.stdout
    assert json.loads(done.stdout.strip().splitlines()[-1])["results"] == found["results"]


def test_a_command_that_fails_is_named():
    with pytest.raises(StepError, match=r"-m cli plan nowhere: status \d+: .*nowhere"):
        gpu_steps.python("-m", "cli", "plan", "nowhere", limit=60)
