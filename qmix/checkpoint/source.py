"""Where a checkpoint's files come from: a local directory, or a repository on the hub.

Both answer the same few questions: which files there are, a small file's path, a weight file's header
without its weights, and the weight file itself when its turn comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qmix.errors import CheckpointError
from qmix.safetensors_header import TensorInfo, check_header, check_no_pointer, read_header

if TYPE_CHECKING:
    from qmix.hub import HubRepo

SAMPLED_PAGES = 64
Progress = Callable[[int, int], None]


class Source(Protocol):
    """Files of one checkpoint; `name` is how messages call it."""

    name: str

    def files(self) -> dict[str, int | None]:
        """File name to size in bytes, or None where it is not known."""

    def small_file(self, name: str) -> Path | None:
        """The local path of a config or tokenizer file; None if there is no such file."""

    def headers(self, names: Iterable[str]) -> dict[str, dict[str, TensorInfo]]:
        """The checked safetensors header of each named file, without its weights."""

    def fetch(self, name: str, progress: Progress | None = None) -> Path:
        """The local path of a weight file, downloaded if need be."""

    def release(self, name: str) -> None:
        """Say that a file is used up, by this run or an earlier one; a source that evicts deletes it."""

    def space_needed(self, names: Iterable[str]) -> list[tuple[Path, int]]:
        """Directories that fetching these files will fill, and by how many bytes at most."""

    def fingerprint(self, names: Iterable[str]) -> str:
        """A digest that changes with the content of the named weight files."""


class LocalSource:
    """A directory on this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = str(directory)

    def files(self) -> dict[str, int | None]:
        try:
            return {path.name: path.stat().st_size for path in sorted(self.directory.iterdir()) if path.is_file()}
        except OSError as error:
            raise CheckpointError(f"{self.directory}: {error.strerror}") from None

    def small_file(self, name: str) -> Path | None:
        path = self.directory / name
        if not path.is_file():
            return None
        check_no_pointer(path)
        return path

    def headers(self, names: Iterable[str]) -> dict[str, dict[str, TensorInfo]]:
        return {name: read_header(self.directory / name) for name in names}

    def fetch(self, name: str, progress: Progress | None = None) -> Path:
        return self.directory / name

    def release(self, name: str) -> None:
        pass

    def space_needed(self, names: Iterable[str]) -> list[tuple[Path, int]]:
        return []

    def fingerprint(self, names: Iterable[str]) -> str:
        """Sizes and pages spread over each file: another training run of the same shape differs."""
        digest = hashlib.sha256()
        for name in sorted(names):
            try:
                self._sample(name, digest.update)
            except (OSError, EOFError) as error:
                what = error.strerror if isinstance(error, OSError) else f"cut short, {error}"
                raise CheckpointError(f"{self.directory / name}: {what}; see `dmesg`, or fetch it again") from None
        return "sampled:" + digest.hexdigest()


class HubSource:
    """A hub repository; with `evict`, weight files pass through `scratch` one by one and are deleted."""

    def __init__(self, repo: HubRepo, scratch: Path | None = None) -> None:
        self.repo = repo
        self.scratch = scratch
        self.name = f"{repo.repo}@{repo.revision}" if repo.revision else repo.repo

    def files(self) -> dict[str, int | None]:
        return {file.name: file.size for file in self.repo.files}

    def small_file(self, name: str) -> Path | None:
        return self.repo.fetch(name) if name in self.files() else None

    def headers(self, names: Iterable[str]) -> dict[str, dict[str, TensorInfo]]:
        sizes = self.files()
        found = {}
        for name, header in self.repo.headers(list(names)).items():
            where, size = f"{self.name}: {name}", sizes[name]
            if size is None:
                raise CheckpointError(f"{where}: the hub does not say how large it is; download the model")
            ends = (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
            # the header's own length is not in its JSON: it is what the payload leaves of the file's size
            found[name] = check_header(header, size - max(ends, default=0), size, where)
        return found

    def fetch(self, name: str, progress: Progress | None = None) -> Path:
        return self.repo.fetch(name, into=self.scratch, progress=progress)

    def release(self, name: str) -> None:
        if self.scratch is not None:
            self.repo.evict(self.scratch / name, self.scratch)

    def space_needed(self, names: Iterable[str]) -> list[tuple[Path, int]]:
        """All that the shared cache lacks; of files that are evicted only the largest at a time."""
        from huggingface_hub import constants

        sizes = self.files()
        missing = [sizes[name] or 0 for name in names if self.repo.cached(name) is None]
        if self.scratch is not None:
            return [(self.scratch, max(missing, default=0))]
        return [(Path(constants.HF_HUB_CACHE), sum(missing))]

    def fingerprint(self, names: Iterable[str]) -> str:
        """The hub's own SHA-256 of each file; the commit where it gives none."""
        wanted = set(names)
        known = sorted((file.name, file.sha256 or self.repo.commit) for file in self.repo.files if file.name in wanted)
        return "hub:" + hashlib.sha256(json.dumps(known).encode()).hexdigest()
