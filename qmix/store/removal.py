"""Remove a store from the disk: its own files only, the manifest or journal last, so that a killed one can go on."""

from __future__ import annotations

import fcntl
import re
import shutil
from contextlib import closing
from pathlib import Path

from qmix.disk.faults import disk_advice
from qmix.errors import StoreError
from qmix.files import leads_to
from qmix.store.journal import JOURNAL
from qmix.store.layout import DENSE_FILE
from qmix.store.listing import StoreEntry
from qmix.store.manifest import MANIFEST, SMALL_FILES
from qmix.store.opened import ORIGIN, PROFILE, SHARDS
from qmix.store.use import LAST_USE, StoreRemoval

OWN = re.compile(r"experts-\d{5}\.safetensors|.*\.aside|\..*\.new")  # layers, and what repairs and writes leave
NAMES = {DENSE_FILE, *SMALL_FILES, ORIGIN, PROFILE, JOURNAL, LAST_USE, MANIFEST}


def remove_store(entry: StoreEntry) -> list[str]:
    """Delete a store, whole or partial, and return the names of other files that were left in its directory.

    Raises StoreError where a process uses, repairs or makes it, or it cannot be deleted.
    """
    try:
        if entry.state == "partial":
            return _remove_partial(entry.directory)
        with closing(StoreRemoval(entry.directory, MANIFEST)):
            return _remove_files(entry.directory)
    except OSError as error:
        where = error.filename or entry.directory
        raise StoreError(f"{where}: {error.strerror}; {disk_advice(error)}") from None


def _remove_partial(directory: Path) -> list[str]:
    with (directory / JOURNAL).open("r+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{directory}: another qmix process is making it; end that first") from None
        if not leads_to(directory / JOURNAL, journal):
            raise StoreError(f"{directory}: another qmix process has finished it; `qmix ls` shows it")
        shutil.rmtree(directory / SHARDS, ignore_errors=True)
        return _remove_files(directory, last=JOURNAL)


def _remove_files(directory: Path, last: str = MANIFEST) -> list[str]:
    there = directory.resolve()
    own = [path for path in there.iterdir() if path.is_file() and (path.name in NAMES or OWN.fullmatch(path.name))]
    for path in sorted(own, key=lambda path: (path.name == last, path.name)):
        path.unlink()
    left = sorted(path.name for path in there.iterdir())
    if not left:
        there.rmdir()
        if directory.is_symlink():
            directory.unlink()
    return left
