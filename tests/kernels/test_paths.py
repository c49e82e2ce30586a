"""The kernels' tests on every CPU path of this processor, in processes held to its instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import real

from qmix.errors import UsageError
from qmix.kernels.cpu.paths import PATHS, cpu_flags, current, environment, supported
from qmix.machine import found

TESTS = Path(__file__).parent
OTHERS = [path.name for path in supported() if path is not current()]
OFTEN = [
    path if path == "avx2" else pytest.param(path, marks=pytest.mark.slow) for path in OTHERS
]  # most processors' path


def pytest_on(path: str, *arguments: str) -> str:
    """Run pytest in a process held to `path`; return its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parents[1],
        env=os.environ | environment(path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.splitlines()[-1]


def test_the_best_path_is_taken_where_none_is_chosen():
    code = "from qmix.kernels.cpu.paths import current; print(current().name)"
    without = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CPU")}
    done = subprocess.run([sys.executable, "-c", code], env=without, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == supported()[0].name


@pytest.mark.parametrize("path", OFTEN)
def test_products_and_one_piece_of_work_on_every_path(path):
    """4-bit, int8 and half products of every remainder compared with fp64, batch invariance, dequantised weights; and
    experts computed together, and all else of a layer for one token, compared with single products and modules."""
    files = ("kernels/test_products", "precision/test_widened", "kernels/test_experts", "model/test_decoder_layer")
    products = "products_of_any or neither_threads or both_products or flat_rows"
    together = "by_hand or (single_products and nf4-bf16) or (transformers_layer and 9-plain)"
    names = [f"tests/{name}.py" for name in files]
    assert "25 passed" in pytest_on(path, *names, "-k", f"{products} or {together}")


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS)
def test_all_kernels_on_every_path(path):
    kernels = ("test_products", "test_attention", "test_kernels", "test_experts", "test_team")
    precision = ("test_widened", "test_matmul", "test_round_trip")
    folders = {"kernels": kernels, "precision": precision, "model": ("test_model", "test_decoder_layer")}
    names = [f"{folder}/{name}" for folder, chosen in folders.items() for name in chosen]
    assert "failed" not in pytest_on(path, *(f"tests/{name}.py" for name in names))


@pytest.mark.parametrize("path", OTHERS)
def test_a_process_held_to_a_path_is_built_for_it(path):
    code = (
        "from numba.core.registry import cpu_target; from qmix.kernels.cpu.paths import current; import torch; "
        "print(current().name, cpu_target.target_context.codegen().magic_tuple()[1])"
    )
    held = os.environ | environment(path)
    done = subprocess.run([sys.executable, "-c", code], env=held, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [path, PATHS[path].llvm]


def test_a_path_that_is_none_or_cannot_run_here_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="'sse9' is not a CPU path; choose one of avx512bf16, avx512, avx2, portable"):
        environment("sse9")
    monkeypatch.setattr("qmix.kernels.cpu.paths.supported", lambda: (PATHS["portable"],))
    with pytest.raises(UsageError, match="cannot run the CPU path avx2; choose one of portable"):
        environment("avx2")


@pytest.mark.parametrize("path", OFTEN)
def test_the_command_line_takes_the_path_from_its_variable(first_use, monkeypatch, path):
    arguments = ("generate", "Click the button to", "-m", "tiny", "--temperature", "0", "--max-new-tokens", "8")
    with monkeypatch.context() as patch:  # so that no kernels are compiled to measure what Python takes on this path
        patch.setattr(found, "current", lambda: PATHS[path])
        patch.setattr(found, "transformers_is_whole", lambda: False)
        for kernels in (False, True):
            found.interpreter_path(first_use.cache / "qmix", kernels).write_text('{"bytes": 400000000}')
    done = real(*arguments, XDG_CACHE_HOME=str(first_use.cache), QMIX_CPU=path)
    assert (done.status, done.out) == (0, " open the menu. Click the icon to\n"), done.err


def test_a_path_that_is_none_is_refused_by_every_command(qmix):
    done = qmix("generate", "x", QMIX_CPU="sse9")
    assert done.status == 2
    assert done.err.startswith("qmix: 'sse9' is not a CPU path; choose one of ")


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("fpu avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16", "avx512bf16"),
        ("fpu avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx512"),
        ("fpu avx2 fma f16c avx512f avx512cd", "avx2"),  # Knights Landing
        ("fpu avx avx2 fma", "portable"),
        ("fpu sse2", "portable"),
    ],
)
def test_the_best_path_by_the_kernels_list_of_flags(tmp_path, monkeypatch, flags, best):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 1\n")
    found = cpu_flags(str(tmp_path / "cpuinfo"))
    monkeypatch.setattr("qmix.kernels.cpu.paths.cpu_flags", lambda: found)
    assert supported.__wrapped__()[0].name == best
    assert cpu_flags(str(tmp_path / "none")) == frozenset()
