"""The files of a checkpoint, in a local directory or a Hub repository.

Both list the files, and give the path of a small file, the header of a weight file without its weights, and the weight
file itself when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from qmix.checkpoint.safetensors_header import MAX_HEADER, TensorInfo, check_header, check_no_pointer, read_header
from qmix.disk.faults import disk_advice
from qmix.errors import CheckpointError
from qmix.files import read_state, write_whole

if TYPE_CHECKING:
    from qmix.checkpoint.hub import HubRepo

Progress = Callable[[int, int], None]


class Source(Protocol):
    """Files of one checkpoint. `name` is for messages; `location` names it from any working directory."""

    name: str

    @property
    def location(self) -> str: ...

    def files(self) -> dict[str, int | None]:
        """Return the size in bytes of each file, None where it is not known."""

    def small_file(self, name: str) -> Path | None:
        """Return the local path of a config or tokenizer file, None if there is none."""

    def headers(self, names: Iterable[str]) -> dict[str, dict[str, TensorInfo]]:
        """Return the checked safetensors header of each file, without its weights."""

    def fetch(self, name: str, progress: Progress | None = None) -> Path:
        """Return the local path of a weight file, downloaded if necessary."""

    def release(self, name: str) -> None:
        """Release a file that is used up, by this run or an earlier one; a source that evicts deletes it."""

    def space_needed(self, names: Iterable[str]) -> list[tuple[Path, int]]:
        """Return directories that fetching these files fills, with the most bytes for each."""

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        """Return a text for each weight file that differs for another or a changed file, without reading weights."""

    def fingerprint(self, names: Iterable[str]) -> str | None:
        """Return a digest of the content of these weight files if it is known without reading them, else None."""

    def recall(self, identity: str) -> str | None:
        """Return the remembered fingerprint of a checkpoint with this identity, None if there is none."""

    def remember(self, identity: str, fingerprint: str) -> None:
        """Store a fingerprint for `recall`."""


class LocalSource:
    """A directory on this machine."""

    def __init__(self, directory: Path, known: Path | None = None) -> None:
        """`known` is the directory of remembered fingerprints."""
        self.directory, self.known = directory, known
        self.name = str(directory)

    @property
    def location(self) -> str:
        return str(self.directory.absolute())

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

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        """Return size, times, inode and a digest of the header, which stay for an untouched file only."""
        return {name: _identity(self.directory / name) for name in names}

    def fingerprint(self, names: Iterable[str]) -> str | None:
        return None

    def recall(self, identity: str) -> str | None:
        if self.known is None:
            return None
        known = read_state(self.known / f"{identity[:32]}.json", _Known)
        return known.fingerprint if known is not None and known.identity == identity else None

    def remember(self, identity: str, fingerprint: str) -> None:
        if self.known is not None:
            with suppress(OSError):  # a cache that is not writable only costs another reading
                self.known.mkdir(parents=True, exist_ok=True)
                path = self.known / f"{identity[:32]}.json"
                write_whole(path, msgspec.json.encode(_Known(identity, fingerprint)))


class _Known(msgspec.Struct, frozen=True):
    identity: str
    fingerprint: str


def _identity(path: Path) -> str:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            start = file.read(8) if path.suffix == ".safetensors" else b""
            header = file.read(min(int.from_bytes(start, "little"), MAX_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {disk_advice(error)}") from None
    times = stat.st_mtime_ns, stat.st_ctime_ns  # ctime cannot be set
    return f"{stat.st_size} {times} {stat.st_ino} {hashlib.sha256(start + header).hexdigest()}"


class HubSource:
    """A Hub repository. With `scratch`, weight files are downloaded there one by one and deleted after use."""

    def __init__(self, repo: HubRepo, scratch: Path | None = None) -> None:
        self.repo = repo
        self.scratch = scratch
        self.name = f"{repo.repo}@{repo.revision}" if repo.revision else repo.repo

    @property
    def location(self) -> str:
        return f"{self.repo.repo}@{self.repo.commit}"

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
                raise CheckpointError(f"{where}: the Hub does not give its size; download the model")
            ends = (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
            # the length of the header is not in its JSON: it is the file's size less the payload
            found[name] = check_header(header, size - max(ends, default=0), size, where)
        return found

    def fetch(self, name: str, progress: Progress | None = None) -> Path:
        return self.repo.fetch(name, into=self.scratch, progress=progress)

    def release(self, name: str) -> None:
        if self.scratch is not None:
            self.repo.evict(self.scratch / name, self.scratch)

    def space_needed(self, names: Iterable[str]) -> list[tuple[Path, int]]:
        """Return the bytes missing in the shared cache; with `scratch`, those of the largest missing file."""
        from huggingface_hub import constants

        sizes = self.files()
        missing = [sizes[name] or 0 for name in names if self.repo.cached(name) is None]
        if self.scratch is not None:
            return [(self.scratch, max(missing, default=0))]
        return [(Path(constants.HF_HUB_CACHE), sum(missing))]

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 that the Hub lists for each file, the commit where it lists none."""
        wanted = set(names)
        return {file.name: file.sha256 or self.repo.commit for file in self.repo.files if file.name in wanted}

    def fingerprint(self, names: Iterable[str]) -> str | None:
        known = sorted(self.identities(names).items())
        return "hub:" + hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def recall(self, identity: str) -> str | None:
        return None

    def remember(self, identity: str, fingerprint: str) -> None:
        pass
