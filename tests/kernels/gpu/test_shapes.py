"""Shapes that fit the kernels, the cuts of sums, and modules that do without Triton."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from qmix.kernels.gpu import shapes
from qmix.kernels.gpu.shapes import ExpertShape


def expert(precision: str, hidden: int, inner: int) -> ExpertShape:
    return ExpertShape(precision, hidden, inner, (0, 64, 128))


@pytest.mark.parametrize(
    ("precision", "hidden", "inner", "dtype", "capability", "fits"),
    [
        ("nf4", 4096, 14336, "bf16", (9, 0), True),
        ("fp4", 256, 320, "fp16", None, True),
        ("nf4", 4096, 14336, "bf16", (7, 5), False),  # Turing has no bf16
        ("nf4", 4096, 14336, "fp16", (7, 5), True),
        ("nf4", 4096, 14336, "fp16", (7, 0), False),
        ("nf4", 4096 + 32, 14336, "bf16", (8, 0), False),  # w1 is flat: its rows end inside a block
        ("nf4", 4096, 14336 + 32, "bf16", (8, 0), False),  # w2 is flat
        ("int8", 80, 96, "bf16", (8, 9), True),
        ("half", 7, 5, "fp16", (12, 0), True),
        ("half", 7, 5, "fp32", (12, 0), False),
    ],
)
def test_what_fits(precision, hidden, inner, dtype, capability, fits):
    assert shapes.fits(expert(precision, hidden, inner), dtype, capability) is fits


@pytest.mark.parametrize(
    ("heads", "fits"), [((32, 8, 128), True), ((48, 8, 128), True), ((8, 2, 48), False), ((34, 2, 64), False)]
)
def test_what_fits_attention(heads, fits):
    assert shapes.fits_attention(*heads) is fits


def test_cuts_follow_from_the_weights():
    assert (shapes.warps_of(4096), shapes.down_splits(14336)) == (2, 4)
    assert (shapes.warps_of(6144), shapes.down_splits(16384)) == (2, 4)
    assert (shapes.warps_of(256), shapes.down_splits(320)) == (2, 1)
    assert (shapes.warps_of(320), shapes.down_splits(384)) == (1, 1)
    assert (shapes.attention_splits(128), shapes.attention_splits(129)) == (1, 2)
    assert shapes.sample_blocks(32000) == 32


def test_qmix_runs_without_triton():
    """None in sys.modules makes an import fail as it does where a package is missing."""
    code = (
        "import sys; sys.modules['triton'] = None; import qmix, qmix.engine, qmix.model.gpu.spread; "
        "from qmix.kernels.gpu import shapes; assert not shapes.available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def launch_fault(monkeypatch, act) -> str:
    """Return the fault where `act` is what Triton's driver does at its first use."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    from qmix.kernels.gpu import launching

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=act))
    return launching.launch_fault.__wrapped__()


def test_what_triton_lacks_to_launch_kernels_is_told(monkeypatch, tmp_path):
    """It builds a C module; here with a compiler that is not there, and then with one that fails."""
    advice = "install a C compiler and Python's headers (on Debian and Ubuntu: apt install gcc python3-dev)"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def build():
        from triton.runtime.build import compile_module_from_src

        compile_module_from_src("int one(void) { return 1; }", "one")

    missing = launch_fault(monkeypatch, build)
    assert missing == f"Triton cannot launch kernels: Failed to find C compiler; {advice}"
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    assert launch_fault(monkeypatch, build) == f"Triton's C module does not compile; {advice}"
    assert launch_fault(monkeypatch, lambda: None) == ""
