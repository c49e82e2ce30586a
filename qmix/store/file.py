"""A weight file of a store, opened for reading."""

from __future__ import annotations

import os
from pathlib import Path

from qmix.disk.direct import DirectFile
from qmix.disk.faults import DISK_ERRORS, disk_advice
from qmix.errors import StoreError, mending


class StoreFile(DirectFile):
    """A DirectFile whose errors are StoreError and say how to mend the store."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
        except OSError as error:
            advice = mending(path.parent) if isinstance(error, FileNotFoundError) else disk_advice(error)
            raise StoreError(f"{path}: {error.strerror}; {advice}") from None

    def read_into(self, pages: memoryview, offset: int, nbytes: int | None = None) -> None:
        """Fill whole pages of memory as DirectFile does. Raises StoreError naming the bytes."""
        try:
            super().read_into(pages, offset, nbytes)
        except OSError as error:
            more = f"; {mending(self.path.parent)}" if error.errno in DISK_ERRORS else ""
            raise StoreError(f"{self.path}: {error.strerror}; {disk_advice(error)}{more}") from None
        except EOFError:
            wanted = f"bytes {offset} to {offset + len(pages) - 1} were wanted"
            size = os.fstat(self.fd).st_size
            raise StoreError(
                f"{self.path}: cut short, ends at byte {size}, {wanted}; {mending(self.path.parent)}"
            ) from None
