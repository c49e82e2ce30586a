"""The cache of machine code: used while the kernels' sources stay the same, and not after any edit of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qmix
from qmix.kernels.cpu import compiled as compiled_module
from qmix.kernels.cpu import paths
from qmix.kernels.cpu.compiled import _CodeFiles

PACKED_PRODUCT = """
import torch
from qmix.kernels.cpu.products import multiply_packed
codes, absmax = torch.full((32 * 32,), 0xFF, dtype=torch.uint8), torch.ones(32, dtype=torch.bfloat16)
x = torch.ones(1, 64).bfloat16()
print(*{int(value) for value in multiply_packed(x, "nf4", codes.data_ptr(), absmax.data_ptr(), 32, 64)[0]})
"""
SHORT_BLOCK = """
import numpy as np
from qmix.kernels.cpu.quantize import quantize_4bit_flat
codes, absmax = np.zeros(16, np.uint8), np.zeros(1, np.float32)
quantize_4bit_flat(np.zeros(32, np.float32), "nf4", codes, absmax, True)
print(absmax[0])
"""


@pytest.fixture
def run(tmp_path) -> Callable[[str], tuple[str, dict[Path, int]]]:
    """Run code on a copy of the package; return its line and the cached files with the times of their writing."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(qmix.__file__).parent, tmp_path / "qmix", ignore=skipped)
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(code: str) -> tuple[str, dict[Path, int]]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip(), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}

    return run


@pytest.mark.parametrize(
    ("code", "name", "before", "after", "results"),
    [
        (PACKED_PRODUCT, "packed_tile", "1 / VALUES[kind][-1]", "3 / VALUES[kind][-1]", ("64", "192")),
        (SHORT_BLOCK, "blocks", "TINY = np.float32(1e-38)", "TINY = np.float32(2)", ("1e-38", "2.0")),
    ],
    ids=["tile", "helper"],
)
def test_an_edited_source_compiles_its_kernels_anew(run, tmp_path, code, name, before, after, results):
    source = tmp_path / f"qmix/kernels/cpu/{name}.py"
    first, cached = run(code)
    assert first == results[0]
    assert cached
    source.touch()  # its date does not matter
    assert run(code) == (first, cached)
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    assert run(code)[0] == results[1]


def test_code_that_was_written_in_part_is_compiled_again(run):
    result, cached = run(SHORT_BLOCK)
    for path in cached:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    again, mended = run(SHORT_BLOCK)
    assert again == result
    assert mended.keys() == cached.keys()
    for path in cached:
        assert hashlib.sha256(path.read_bytes()[32:]).digest() == path.read_bytes()[:32]


def test_code_is_kept_apart_for_constants_processors_and_paths(tmp_path, monkeypatch):
    """One function's files; the two parts of the last entry of a key are its bytecode and its constants."""
    files, key = _CodeFiles(str(tmp_path), "kernel"), ("(int64,)", ("x86", "zen4", "+avx2"), ("bytecode", "nf4"))
    others = [(*key[:1], ("x86", "zen3", "+avx2"), key[2]), (*key[:2], ("bytecode", "fp4")), ("(int32,)", *key[1:])]
    for number, each in enumerate((key, *others)):
        files.save(each, number)
    assert [files.load(each) for each in (key, *others)] == [0, 1, 2, 3]
    assert files.load((*key[:2], ("edited", "nf4"))) is None
    files.save((*key[:2], ("edited", "nf4")), 5)
    assert len(list(tmp_path.iterdir())) == 4  # in place of the code before
    monkeypatch.setattr(compiled_module, "current", lambda: paths.PATHS["portable"])
    assert files.load(others[0]) is None


def test_code_of_another_numba_is_not_even_unpickled(tmp_path, monkeypatch):
    """Its classes may be gone."""
    files, key = _CodeFiles(str(tmp_path), "kernel"), ("(int64,)", ("x86", "zen4", "+avx2"), ("bytecode", "nf4"))
    files.save(key, 1)
    monkeypatch.setattr(compiled_module.numba, "__version__", "another")
    monkeypatch.setattr(compiled_module.pickle, "loads", None)
    assert files.load(key) is None


def test_a_directory_that_cannot_be_written_is_named_once(tmp_path, caplog):
    files = _CodeFiles(str(tmp_path / "missing"), "kernel")
    for number in range(2):
        files.save(("", (), ("", number)), 1)
    assert files.load(("", (), ("", 0))) is None
    assert [record.message for record in caplog.records] == [
        "kernels are compiled again at the next start, in up to 20 s: "
        f"{tmp_path}/missing cannot be written (No such file or directory)"
    ]
