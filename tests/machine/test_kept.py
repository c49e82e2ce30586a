from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qmix.machine.kept import PRODUCT_CACHES

GROWTH = """
import json, os
import torch
from qmix.machine.found import own_memory
from qmix.machine.kept import limit_kept_memory

limit_kept_memory()
x, weight = torch.ones(256, 256).bfloat16(), torch.ones(320, 256).bfloat16()
with torch.inference_mode():
    torch.nn.functional.linear(x, weight)
    before = own_memory()
    for tokens in range(33, 255):
        torch.nn.functional.linear(x[:tokens], weight)
print(json.dumps([own_memory() - before, {name: os.environ[name] for name in json.loads('NAMES')}]))
"""


@pytest.mark.parametrize("users", [{}, {"LRU_CACHE_CAPACITY": "20"}], ids=["qmix's", "the user's"])
def test_products_of_222_shapes_leave_the_code_of_a_few(users, monkeypatch):
    """The process grows by less than 50 MB; without the limit it is 150 MB."""
    for name in PRODUCT_CACHES:
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    script = GROWTH.replace("NAMES", json.dumps([*PRODUCT_CACHES]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, used = json.loads(done.stdout)
    assert grown < 50e6
    assert used == PRODUCT_CACHES | users
