"""4-bit products on the CPU when bitsandbytes has loaded its CUDA library, which lacks the CPU's kernels."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.cextension import BNBNativeLibrary

from qmix.kernels.cpu.paths import PATHS, PORTABLE, current, supported
from qmix.machine import doctor
from qmix.machine import measured as machine_profile
from qmix.machine.doctor_view import report_table
from qmix.machine.four_bit import try_four_bit
from qmix.machine.rates import FourBitProducts, Rates
from qmix.precision import bitsandbytes as bitsandbytes_quiet
from qmix.precision import quantised
from qmix.precision.quantised import FourBitMatrix, has_kernels
from qmix.terminal.tables import print_table

SIZES = {"large": (512, 1024), "small": (64, 128)}
needs_pairs = pytest.mark.skipif(not current().pairs, reason="a CPU path without AVX512-BF16")


@pytest.fixture
def cuda_library(monkeypatch) -> Iterator[None]:
    """Give bitsandbytes a library without its functions, the C library, instead of the CPU's."""
    for function in (quantised.packed_kernel, bitsandbytes_quiet.cpu_library):
        function.cache_clear()
    monkeypatch.setattr(functional, "lib", BNBNativeLibrary(ctypes.CDLL(None)))
    yield
    for function in (quantised.packed_kernel, bitsandbytes_quiet.cpu_library):
        function.cache_clear()


@pytest.fixture
def no_library(monkeypatch) -> Iterator[None]:
    """Take away bitsandbytes' library for the CPU."""
    quantised.packed_kernel.cache_clear()
    monkeypatch.setattr(quantised, "cpu_library", lambda: None)
    yield
    quantised.packed_kernel.cache_clear()


def matrix(kind: str, rows: int, cols: int, invariant: bool = False) -> FourBitMatrix:
    draws = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=draws)
    absmax = torch.rand(cols // 64, rows, generator=draws).bfloat16()
    return FourBitMatrix(kind, codes, absmax, rows, cols, invariant)


def assert_fast(each: FourBitMatrix, monkeypatch, kernel: str) -> None:
    """Assert that `kernel` multiplies, without dequantising, with the values of the dequantised matrix."""
    x = torch.randn(5, each.cols, generator=torch.Generator().manual_seed(4)).bfloat16()
    want = x.float() @ each.dequantize(0, each.rows).T
    with monkeypatch.context() as patch:
        patch.setattr(FourBitMatrix, "dequantize", lambda *_: pytest.fail("the slow path was taken"))
        got = each.multiply(x)
    assert each.kernel == kernel
    assert (got.float() - want).norm() < 0.008 * want.norm()


@needs_pairs
@pytest.mark.usefixtures("cuda_library")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("size", "invariant", "kernel"),
    [("large", False, "qmix"), ("small", False, "bitsandbytes"), ("small", True, "qmix")],
    ids=["large", "small", "small in a batch"],
)
def test_products_take_kernels_beside_the_cuda_library(monkeypatch, kind, size, invariant, kernel):
    assert not functional.has_avx512bf16()  # what bitsandbytes itself says then
    assert_fast(matrix(kind, *SIZES[size], invariant), monkeypatch, kernel)


@needs_pairs
@pytest.mark.usefixtures("no_library")
def test_qmix_own_products_need_nothing_of_bitsandbytes(monkeypatch):
    assert_fast(matrix("nf4", *SIZES["large"]), monkeypatch, "qmix")
    assert matrix("nf4", *SIZES["small"]).kernel is None
    assert not has_kernels({"nf4"}, [SIZES["small"]])
    assert has_kernels({"nf4"}, [SIZES["large"]])
    assert has_kernels({"int8"}, [SIZES["small"]])


def test_shapes_that_no_kernel_takes_are_told():
    assert not has_kernels({"fp4", "half"}, [(33, 47)])


@needs_pairs
@pytest.mark.usefixtures("cuda_library")
def test_a_trial_finds_the_kernels_beside_the_cuda_library():
    for kind in ("nf4", "fp4"):
        trial = try_four_bit(kind)
        assert (trial.large, trial.small, trial.correct) == ("qmix", "bitsandbytes", True)
        assert trial.fast


def shown(trial: machine_profile.FourBitTrial, tmp_path, capsys) -> str:
    """Return the row of the 4-bit kernel, unfolded."""
    print_table(report_table(doctor.examine(tmp_path, Rates(), trial)))
    return " ".join(capsys.readouterr().out.partition("4-bit kernel")[2].partition("\nmemory")[0].split())


def test_doctor_and_plans_tell_what_was_tried_and_not_what_the_flags_promise(monkeypatch, tmp_path, capsys):
    """The CPU's flags promise a kernel, but none multiplies: the answer is no."""
    path = tmp_path / "machine.json"
    monkeypatch.setattr(machine_profile, "supported", lambda: [PATHS["avx512bf16"]])
    assert machine_profile.four_bit_products(path) == FourBitProducts(fast=True, tried=False)
    monkeypatch.setattr(quantised, "four_bit_kernel", lambda kind, ours: None)
    trial = try_four_bit()
    assert (trial.large, trial.small, trial.correct, trial.fast) == (None, None, True, False)
    machine_profile.keep(four_bit=trial, path=path)
    assert machine_profile.four_bit_products(path) == FourBitProducts(fast=False, tried=True)
    assert "none, tested: 4-bit matmul takes about" in shown(trial, tmp_path, capsys)


@pytest.mark.parametrize(
    ("path", "small", "fast", "told"),
    [
        (
            "avx512bf16",
            "bitsandbytes",
            True,
            r"yes, tested: avx512bf16, 9 GB/s from cache, 90 times as fast as without it",
        ),
        ("avx2", "qmix", True, r"yes, tested: avx2, .* as fast as without it; the CPU has avx512bf16"),
        ("portable", "qmix", False, r"a slow one, tested: portable, .*; the CPU has avx512bf16"),
        ("avx512bf16", None, False, r"tested: none for small matrices; `pip install .* bitsandbytes` .*"),
    ],
)
def test_doctor_names_the_instructions_that_were_used(monkeypatch, tmp_path, capsys, path, small, fast, told):
    monkeypatch.setattr(doctor, "supported", lambda: [PATHS["avx512bf16"]])
    trial = machine_profile.FourBitTrial(path, "qmix", small, True, 9e9, 90.0)
    assert trial.fast is fast
    assert re.fullmatch(told, shown(trial, tmp_path, capsys))


@pytest.mark.parametrize("best", PATHS)
def test_what_was_not_tried_is_what_the_flags_promise(monkeypatch, tmp_path, best):
    monkeypatch.setattr(machine_profile, "supported", lambda: [PATHS[best]])
    assert machine_profile.four_bit_products(tmp_path / "none.json") == FourBitProducts(best != "portable", tried=False)


def test_a_kernel_with_wrong_values_is_no_kernel(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(FourBitMatrix, "multiply", lambda self, x: torch.zeros(len(x), self.rows).bfloat16())
    trial = try_four_bit()
    assert not trial.correct
    assert not trial.fast
    assert "wrong values" in shown(trial, tmp_path, capsys)


def test_a_trial_with_other_versions_counts_for_nothing(monkeypatch, tmp_path):
    """A torch with CUDA changes the product's kernel, but not the rate of the disk."""
    path = tmp_path / "machine.json"
    trial = machine_profile.FourBitTrial("avx2", None, None, True, 1e9, 1.0)
    machine_profile.keep({"disk_read": 2e9, "four_bit_read": 3e9}, trial, path)
    assert machine_profile.measured_rates(path).measured == {"disk_read", "four_bit_read"}
    monkeypatch.setattr(machine_profile, "version", lambda name: "2.99+cu130")
    assert machine_profile.tried_four_bit(path) is None
    assert machine_profile.four_bit_products(path) == FourBitProducts(supported()[0].name != PORTABLE)
    assert machine_profile.measured_rates(path).measured == {"disk_read"}
    again = machine_profile.FourBitTrial("avx2", "qmix", "bitsandbytes", True, 1e9, 100.0)
    machine_profile.keep(four_bit=again, path=path)
    assert machine_profile.tried_four_bit(path) == again
    assert machine_profile.measured_rates(path).measured == {"disk_read"}


@needs_pairs
def test_doctor_and_plan_beside_the_cuda_library_in_a_real_process(tmp_path):
    code = (
        "import ctypes, sys; from qmix.precision.bitsandbytes import functional;"
        "from bitsandbytes.cextension import BNBNativeLibrary;"
        "functional.lib = BNBNativeLibrary(ctypes.CDLL(None)); assert not functional.has_avx512bf16();"
        "import cli; sys.argv[1:] = ['doctor', '--no-measure', '--json']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fast_kernels"]
    assert (found["four_bit"]["large"], found["four_bit"]["small"]) == ("qmix", "bitsandbytes")
    assert machine_profile.four_bit_products() == FourBitProducts(fast=True, tried=True)  # kept, and read by plans
