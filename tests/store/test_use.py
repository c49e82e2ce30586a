"""Marks of use in a store, between processes that run, look and remove."""

from __future__ import annotations

import fcntl
import threading

import pytest

from qmix.errors import StoreError
from qmix.store.use import LAST_USE, StoreUse, in_use


def test_a_run_that_begins_while_somebody_looks_waits_for_the_look(tmp_path):
    with (tmp_path / LAST_USE).open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        done = threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN))
        done.start()
        use = StoreUse(tmp_path)
        done.join()
    assert in_use(tmp_path)
    use.close()
    assert not in_use(tmp_path)


def test_a_store_that_is_being_removed_is_refused(tmp_path):
    with (tmp_path / LAST_USE).open("w") as removing:
        fcntl.flock(removing, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another qmix process is removing it"):
            StoreUse(tmp_path)
