"""Checkpoints on the Hugging Face Hub: the files of a repository, fetched one at a time.

All traffic goes through huggingface_hub (imported on first use), so HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE work as usual.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmix.checkpoint.hub_calls import AGAIN, NO_FILE, HubFile, Progress, explain, muted, retried, silent_bar, why_away
from qmix.errors import Cancelled, HubError, QmixError
from qmix.files import convert_json, write_whole

_MODEL = re.compile(r"(?!.*\.\.)(?![^@]*--)(\w[\w.-]*/\w(?:[\w.-]*\w)?)(?:@(\w\S*))?", re.ASCII)


def parse(model: str) -> tuple[str, str | None] | None:
    """Return (repo, revision) of "org/name" or "org/name@revision", None for any other text, such as a path."""
    match = _MODEL.fullmatch(model)
    return (match[1], match[2]) if match else None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model repository at one commit. Every method raises HubError and may be called from any thread."""

    repo: str
    revision: str | None  # as given
    endpoint: str
    commit: str = ""
    files: tuple[HubFile, ...] = ()  # by name
    away: str = ""  # why the Hub did not answer; `files` are then those in the cache

    @classmethod
    def open(cls, model: str, endpoint: str | None = None) -> HubRepo:
        """Look up "org/name[@revision]", in the cache if HF_HUB_OFFLINE is set or the Hub cannot be reached."""
        from huggingface_hub import HfApi, constants

        parsed = parse(model)
        if parsed is None:
            raise HubError(f"{model!r} is not a model on the Hub; write org/name or org/name@revision")
        asked = cls(*parsed, endpoint=(endpoint or constants.ENDPOINT).rstrip("/"))
        with asked._calling():
            api = HfApi(endpoint=asked.endpoint)
            options: dict[str, Any] = {"revision": asked.revision, "files_metadata": True, "timeout": 30}
            try:
                info = retried(lambda: api.model_info(asked.repo, **options))
            except Exception as error:
                away = why_away(error, asked.endpoint)
                if not away:
                    raise
                return replace(asked, away=away)._from_cache()
            files = []
            for each in info.siblings or ():
                size, sha256 = (each.lfs.size, each.lfs.sha256) if each.lfs else (each.size, None)
                told = {"name": each.rfilename, "size": size, "sha256": sha256}
                files.append(convert_json(told, HubFile, f"{asked._label}: the Hub's list of files", HubError, AGAIN))
            return replace(asked, commit=str(info.sha), files=tuple(sorted(files)))

    def fetch(self, name: str, *, into: Path | None = None, progress: Progress | None = None) -> Path:
        """Return the path of a file, downloaded and checked against its size and sha256 if it is not there yet.

        Without `into` it is kept in the shared cache. With `into`, a file that is not in the shared cache is kept in
        that folder only, until evict(). A folder serves one process at a time.
        """
        file = self._file(name)
        with self._calling(file, into):
            path = self.cached(name)
            if path is None and into is not None:
                return self._fetch_into(file, into, progress)
            path = path or self._download(file, None, progress)
            self._remember_revision(path.parents[name.count("/")])
            return path

    def evict(self, path: Path, into: Path) -> None:
        """Delete a file that fetch() put below `into`; keep any other, such as one in the shared cache."""
        from huggingface_hub import constants

        folder, into = path.parent.resolve(), into.resolve()
        in_cache = folder.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())
        if in_cache or not folder.is_relative_to(into):
            return
        with self._calling(into=into):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # keep a folder that is not empty
            while folder != into:
                folder.rmdir()
                folder = folder.parent

    def headers(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the safetensors header of each file as JSON, from the cache or by range requests (100 kB)."""
        names = list(names)
        pool = ThreadPoolExecutor(8)
        with self._calling():
            try:
                return dict(zip(names, pool.map(self._header, names), strict=True))
            finally:
                pool.shutdown(cancel_futures=True)

    def _header(self, name: str) -> dict[str, Any]:
        from huggingface_hub import HfApi, parse_local_safetensors_file_metadata

        with self._calling(self._file(name)):
            api, path = HfApi(endpoint=self.endpoint), self.cached(name)
            if path is not None:
                found = parse_local_safetensors_file_metadata(path)
            else:
                options: dict[str, Any] = {"revision": self.commit}
                found = retried(lambda: api.parse_safetensors_file_metadata(self.repo, name, **options))
            header: dict[str, Any] = {"__metadata__": found.metadata} if found.metadata else {}
            for key, info in found.tensors.items():
                offsets = list(info.data_offsets)
                header[key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
            return header

    @property
    def _label(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @contextmanager
    def _calling(self, file: HubFile | None = None, into: Path | None = None) -> Iterator[None]:
        """Mute huggingface_hub, and turn its exceptions into one-line HubErrors."""
        with muted():
            try:
                yield
            except (QmixError, Cancelled):  # also raised by `progress`
                raise
            except Exception as error:
                told = explain(error, self.endpoint, self.repo, self._label, file, into)
                raise HubError(told) from error

    def _file(self, name: str) -> HubFile:
        for file in self.files:
            if file.name == name:
                return file
        gone = f"not in the cache, and {self.away}" if self.away else NO_FILE
        raise HubError(f"{name} of {self._label}: {gone}")

    def cached(self, name: str) -> Path | None:
        """Return the path of a file in the shared cache, None if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def _from_cache(self) -> HubRepo:
        """Return the repository with the commit and files of the shared cache, complete or not."""
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            if not hasattr(error, "snapshot_path"):
                where = f"{self._label}: not in the cache ({constants.HF_HUB_CACHE})"
                raise HubError(f"{where}, and {self.away}") from error
            folder = Path(error.snapshot_path)  # incomplete
        files = []
        for path in folder.rglob("*"):
            if path.is_file():
                blob = path.readlink().name if path.is_symlink() else ""
                sha256 = blob if re.fullmatch("[0-9a-f]{64}", blob) else None  # the name of a large file's blob
                files.append(HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256))
        return replace(self, commit=folder.name, files=tuple(sorted(files)))

    def _fetch_into(self, file: HubFile, into: Path, progress: Progress | None) -> Path:
        """Download a file into a folder; it appears there only when it is complete and checked."""
        target, part = into / file.name, into / f".{file.name.replace('/', '--')}.part"
        shutil.rmtree(part, ignore_errors=True)  # left by a killed run
        if file.sha256 and target.is_file() and _sha256(target) == file.sha256:
            return target
        try:
            path = self._download(file, part, progress)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    def _download(self, file: HubFile, folder: Path | None, progress: Progress | None) -> Path:
        """Download a file into `folder` or the shared cache and check it. Raises HubError."""
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {"revision": self.commit, "local_dir": folder, "endpoint": self.endpoint}
        options["tqdm_class"] = silent_bar(progress, file.size or 0)
        path = Path(retried(lambda: hf_hub_download(self.repo, file.name, **options)))
        if file.size is not None and path.stat().st_size != file.size:
            wrong = f"has {path.stat().st_size} bytes instead of {file.size}"
        elif file.sha256 is not None and _sha256(path) != file.sha256:
            wrong = "is damaged (its sha256 is not the one that the Hub lists)"
        else:
            return path
        for each in (path.resolve(), path):  # in the shared cache, a blob and the link to it
            each.unlink(missing_ok=True)
        raise HubError(f"{file.name} of {self._label}: {wrong} and was deleted; {AGAIN}")

    def _remember_revision(self, snapshot: Path) -> None:
        """Note the commit of the revision in the shared cache, which fetching by commit does not do."""
        ref = snapshot.parents[1] / "refs" / (self.revision or "main")
        with suppress(OSError):  # a cache that is not writable only costs the look-up when offline
            if ref.name != self.commit and not (ref.is_file() and ref.read_text() == self.commit):
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_whole(ref, self.commit.encode())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()
