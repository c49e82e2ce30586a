"""A model that cannot be opened leaves no memory, file or thread in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import make_store

from qmix.engine.opener import OpenModel
from qmix.errors import StoreError


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_store_that_fails_half_way_leaves_no_file_open(tiny, tmp_path):
    store = make_store(tiny, tmp_path / "store")
    slots = dict.fromkeys(store.layout.record_counts, 2)
    OpenModel(store, slots, "sdpa").close()
    before = open_files()
    (store.directory / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.raises(StoreError, match="num_beams 4"):
        OpenModel(store, slots, "sdpa")
    assert open_files() == before
    with OpenModel(store, slots, "sdpa", generates=False) as opened:
        assert not hasattr(opened, "tokenizer")
    assert open_files() == before
