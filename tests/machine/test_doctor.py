"""A machine's report and rates, kept and used: from files made for the test, and once for real."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from qmix.bench import machine_rates
from qmix.kernels.cpu.paths import PATHS
from qmix.machine import ceilings, doctor
from qmix.machine import found as machine
from qmix.machine import measured as machine_profile
from qmix.machine.cuda_context import taken_by
from qmix.machine.doctor import examine, huge_pages, product_fault, reads_directly, takes_huge_pages
from qmix.machine.measured import MeasuredGpus
from qmix.machine.rates import RATE_NAMES, Rates


def test_the_cpus_name_comes_from_proc(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: sse fma\n\nprocessor\t: 1\nmodel name\t: B\n"
    )
    assert machine.cpu_name(tmp_path) == "A CPU"
    assert machine.cpu_name(tmp_path / "nowhere")


def test_torch_is_asked_for_gpus_only_where_there_is_a_driver(tmp_path):
    assert not machine.gpu_driver(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert machine.gpu_driver(tmp_path)


def test_huge_pages_is_the_word_in_brackets(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages(tmp_path / "enabled") == "madvise"
    assert huge_pages(tmp_path / "none") == "unknown"


def test_measured_rates_are_kept_and_those_of_another_machine_are_not_taken(tmp_path):
    path = tmp_path / "deep" / "machine.json"
    assert machine_profile.measured_rates(path) == Rates()
    machine_profile.keep({"disk_read": 1e9, "matmul": 2e12}, path=path)
    found = machine_profile.measured_rates(path)
    assert (found.disk_read, found.matmul, found.pcie) == (1e9, 2e12, Rates().pcie)
    assert found.measured == {"disk_read", "matmul"}
    content = json.loads(path.read_text())
    for change in ({"machine": {"cpu": "another"}}, {"schema": "other"}, {"rates": 3}):
        path.write_text(json.dumps(content | change))
        assert machine_profile.measured_rates(path) == Rates()
    path.write_text("{")
    assert machine_profile.measured_rates(path) == Rates()


def test_a_report_names_what_was_not_measured(tmp_path):
    trial = machine_profile.FourBitTrial("avx2", "qmix", "bitsandbytes", True, 1e9, 100.0)
    report = examine(tmp_path, Rates().with_measured({"disk_read": 1e9}), trial)
    assert "disk_read" not in report.typical
    assert {"memory_read", "layer_seconds"} <= set(report.typical)
    assert report.versions["torch"] == torch.__version__
    assert report.cores >= 1
    assert json.loads(json.dumps(report.to_json()))["schema"] == "qmix-doctor-1"
    assert list(tmp_path.iterdir()) == []  # what was tried on is gone


def test_direct_reads_are_tried_where_stores_will_lie(tmp_path):
    assert not reads_directly(tmp_path / "a" / "b") or reads_directly(tmp_path)  # the nearest directory there is
    assert not reads_directly(tmp_path.__class__("/proc"))


def test_the_disk_is_read_from_a_scratch_file_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_rates, "SCRATCH_BYTES", 2 * machine_rates.CHUNK)
    assert machine_rates.disk_read(tmp_path / "new") > 1e6
    assert list((tmp_path / "new").iterdir()) == []


def test_products_are_timed_over_real_records(monkeypatch):
    monkeypatch.setattr(machine_rates, "POOL_BYTES", 0)
    monkeypatch.setattr(machine_rates, "ROWS", 2048)
    assert 1e6 < machine_rates.four_bit_read() < 1e13
    assert 1e6 < machine_rates.half_read() < 1e13
    assert 1e6 < machine_rates.own_products() < 1e16


def test_overheads_come_from_the_embedded_model(first_use, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(first_use.cache))
    monkeypatch.setattr(machine_rates, "TOKENS", 8)
    found = machine_rates.overheads(Rates())
    assert set(found) == {"layer_seconds", "read_seconds"}
    assert 1e-6 <= found["layer_seconds"] < 1


def test_doctor_reports_as_a_table_and_as_json(qmix):
    table = qmix("doctor", "--no-measure")
    assert table.status == 0
    assert re.search(r"^4-bit kernel +(yes|a slow one|none), tested: ", table.out, re.MULTILINE)
    assert table.err.startswith("not measured: memory_read, disk_read")
    found = json.loads(qmix("doctor", "--no-measure", "--json").out)
    assert set(found["rates"]) == set(RATE_NAMES)
    assert {rate["source"] for rate in found["rates"].values()} == {"typical"}
    machine = json.loads(qmix("plan", "tiny", "--json").out)["machine"]
    assert (machine["fast_kernels"], machine["fast_kernels_tried"]) == (found["fast_kernels"], True)


def test_a_plan_says_whether_the_kernel_was_tried(qmix):
    before = qmix("plan", "tiny").out
    assert "`qmix doctor` tests it" in before
    qmix("doctor", "--no-measure")
    assert "tested by `qmix doctor`" in qmix("plan", "tiny").out


def test_a_report_is_shown_where_it_cannot_be_kept(qmix, isolated_home):
    (isolated_home / ".local").write_text("in the way")
    done = qmix("doctor", "--no-measure")
    assert done.status == 1
    assert "4-bit kernel" in done.out
    assert done.lines[-1].endswith("the measurements are not kept")


def test_memory_on_huge_pages_is_tried_and_counted(tmp_path):
    counts = tmp_path / "smaps_rollup"
    assert takes_huge_pages(counts) is None
    counts.write_text("Rss: 5 kB\nAnonHugePages:      2048 kB\n")
    assert takes_huge_pages(counts) is False
    assert takes_huge_pages() in (True, False, None)


def test_a_product_on_a_device_is_tried(monkeypatch):
    assert product_fault("cpu") == ""
    assert "nowhere" in product_fault("nowhere:0")
    monkeypatch.setattr(torch, "ones", lambda *_, **how: torch.zeros(doctor.PRODUCT, doctor.PRODUCT))
    assert product_fault("cpu") == "a product on it gives wrong values"


def test_a_gpu_that_torch_lists_and_cannot_use_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1, 2))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old")
    monkeypatch.setattr(doctor, "product_fault", lambda device: f"no kernel image for {device}")
    trial = machine_profile.FourBitTrial("avx2", "qmix", "bitsandbytes", True, 1e9, 100.0)
    report = examine(tmp_path, Rates(), trial)
    assert report.gpus == (doctor.Gpu("Old", 2, 1, "no kernel image for cuda:0"),)
    assert report.to_json()["gpus"][0]["fault"] == "no kernel image for cuda:0"


@pytest.mark.slow
def test_doctor_measures_and_plans_use_it(qmix):
    done = qmix("doctor", "--json")
    assert done.status == 0
    assert done.err.splitlines()[-1].startswith("kept in ")
    rates = json.loads(done.out)["rates"]
    assert {name for name, rate in rates.items() if rate["source"] == "measured"} >= {"memory_read", "disk_read"}
    assert json.loads(qmix("plan", "tiny", "--json").out)["machine"]["rates"] == rates


def test_a_context_is_what_is_no_longer_free_besides_what_torch_counts():
    free = iter([1000, 300])
    child = [sys.executable, "-c", "import sys; print(100, flush=True); sys.stdin.read()"]
    assert taken_by(child, lambda: next(free)) == 600
    assert taken_by([sys.executable, "-c", "raise SystemExit(1)"], lambda: 1000) is None


def test_the_gpus_that_were_measured_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "machine.json"
    assert machine_profile.measured_gpus(path) == MeasuredGpus()
    known = MeasuredGpus(("NVIDIA GeForce RTX 4090",), 450 * 2**20, {"nf4 bf16": 32, "fp4 fp16": 128})
    machine_profile.keep({"pcie": 2e10}, path=path, gpus=known)
    assert machine_profile.measured_gpus(path) == known
    assert machine_profile.dense_from("bf16", path) == {"nf4": 32}
    machine_profile.keep(four_bit=machine_profile.FourBitTrial("avx2", "qmix", "qmix", True, 1e9, 9.0), path=path)
    assert machine_profile.measured_gpus(path) == known
    monkeypatch.setattr(machine_profile, "_stack", lambda: {"torch": "another"})
    assert machine_profile.measured_gpus(path) == MeasuredGpus(known.names)  # the rest was another torch's
    assert machine_profile.dense_from("bf16", path) == {}


def test_a_gpus_ceilings_are_measured_with_the_cpu_in_its_place(monkeypatch):
    monkeypatch.setattr(ceilings, "GPU_BYTES", 2**22)
    monkeypatch.setattr(ceilings, "GPU_SIZE", 64)
    found = ceilings.gpu_ceilings(torch.device("cpu"))
    assert set(found) == {"gpu_memory", "gpu_matmul", "pcie"}
    assert all(len(rate.rounds) == ceilings.ROUNDS for rate in found.values())


def test_a_card_is_named_for_measured_rates(monkeypatch, tmp_path):
    """`doctor` names the GPUs that work, and takes the largest context."""
    cards = (doctor.Gpu("A", 2, 1), doctor.Gpu("Old", 2, 1, "no kernel image"), doctor.Gpu("B", 2, 1))
    monkeypatch.setattr(doctor, "_gpus", lambda: cards)
    monkeypatch.setattr(doctor, "context_bytes", {0: 5, 2: 7}.get)
    monkeypatch.setattr(doctor, "try_dense", lambda gpus: {"nf4 bf16": 8 * len(gpus)})
    assert doctor.examine_gpus() == MeasuredGpus(("A", "B"), 7, {"nf4 bf16": 16})
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_gpus", tuple)
    assert doctor.examine_gpus() == MeasuredGpus()


@pytest.mark.parametrize(
    ("capability", "fault"),
    [
        ((8, 6), ""),
        ((12, 0), ""),
        ((7, 5), "it has none for bf16; quantise the model in fp16"),
        ((6, 1), "they need a card of compute capability 7.5 or later, this one has 6.1"),
    ],
)
def test_why_a_card_has_not_all_kernels(monkeypatch, capability, fault):
    monkeypatch.setattr(doctor, "available", lambda: True)
    monkeypatch.setattr("qmix.kernels.gpu.launching.launch_fault", lambda: "")
    assert doctor.kernels_fault(capability) == fault
    monkeypatch.setattr("qmix.kernels.gpu.launching.launch_fault", lambda: "no compiler")
    assert doctor.kernels_fault(capability) == "no compiler"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_rates_are_measured():
    found = machine_rates.gpu_rates(torch.device("cuda", 0))
    assert set(found) == {"pcie", "gpu_memory", "gpu_matmul"}
    assert all(rate > 1e8 for rate in found.values())


def test_the_cpus_rates_are_those_of_its_path_and_threads(tmp_path, monkeypatch):
    path = tmp_path / "machine.json"
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    trial = machine_profile.FourBitTrial("avx2", "qmix", "qmix", True, 1e9, 100.0)
    rates = {"disk_read": 1e9, "four_bit_read": 8e9, "memory_read": 12e9, "matmul": 4e12, "layer_seconds": 1e-3}
    machine_profile.keep(rates, trial, path, widened={"nf4 bf16": 64, "int8 fp16": 128})
    assert machine_profile.measured_rates(path).measured == set(rates)
    assert machine_profile.widened_from("bf16", path) == {"nf4": 64}
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found = machine_profile.measured_rates(path)
    # twice the threads: the product would read 16 GB/s, memory gives 12
    assert (found.four_bit_read, found.memory_read, found.matmul, found.layer_seconds) == (12e9, 12e9, 8e12, 1e-3)
    assert [found.source(name) for name in ("disk_read", "matmul", "layer_seconds")] == ["measured", "scaled", "scaled"]
    assert machine_profile.widened_from("bf16", path) == {}
    assert machine_profile.tried_four_bit(path) is None
    machine_profile.keep({"disk_read": 2e9, "matmul": 5e12}, path=path)
    assert machine_profile.measured_rates(path).matmul == 5e12
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert machine_profile.measured_rates(path).matmul == 4e12
    assert machine_profile.measured_rates(path).disk_read == 2e9
    assert machine_profile.tried_four_bit(path) == trial
    monkeypatch.setattr(machine_profile, "current", lambda: PATHS["portable"])
    assert machine_profile.measured_rates(path).measured == {"disk_read"}
