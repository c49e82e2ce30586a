"""Calls to huggingface_hub: mute its output, retry temporary failures, explain the others."""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qmix.units import format_bytes

T = TypeVar("T")
Progress = Callable[[int, int], None]  # (bytes done, total bytes); may be called from another thread

NO_FILE = "file not found; check the name or the revision"
AGAIN = "run the same command again (finished files are kept)"


@dataclass(frozen=True, slots=True, order=True)
class HubFile:
    """A file of a repository: its size in bytes, and its sha256 (hex) if it is large."""

    name: str
    size: int | None
    sha256: str | None


@contextmanager
def muted() -> Iterator[None]:
    """Mute the logs and warnings of huggingface_hub."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="huggingface_hub")
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(level)


def silent_bar(progress: Progress | None, size: int) -> type:
    """Return a class for `tqdm_class` that draws nothing and passes the bytes written to `progress`."""

    class Bar:
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any) -> None:
            self.total, self.n = total, initial

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            if progress is not None:
                progress(self.n, self.total or size)

        def update_transfer(self, n: float | None = 1) -> None:
            """Exist, so that Xet does not ask for a second bar for the bytes on the wire."""

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None  # close, refresh, set_postfix_str, ...

    return Bar


def retried(call: Callable[[], T], tries: int = 3) -> T:
    """Return `call()`, retried after 1 s and 2 s at temporary failures that huggingface_hub does not retry itself."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for pause in range(1, tries):
        try:
            return call()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                passing = error.response.status_code in (408, 429, 500, 502, 503, 504)
            else:
                passing = type(error).__name__ not in ("ConnectError", "ConnectTimeout")
            if not passing:
                raise
        time.sleep(pause)
    return call()


def explain(error: BaseException, host: str, repo: str, label: str, file: HubFile | None, into: Path | None) -> str:
    """Return one line on why a call about a repository, or a file of it, failed, and what to do.

    `label` is the name that the user gave; `into` is the folder of a download, None for the shared cache.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    if isinstance(error, hf.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why a download did not start
    page = f"{host}/{repo}"
    where = f"{file.name} of {label}" if file else label
    if away := why_away(error, host):
        return f"{where}: {away}"
    status = error.response.status_code if isinstance(error, hf.HfHubHTTPError) else 0
    for kind, told in (
        (hf.GatedRepoError, f"{label}: gated; accept its licence at {page} and set HF_TOKEN"),
        (hf.RepositoryNotFoundError, f"{label}: not on {host}, or private; check the name, or set HF_TOKEN"),
        (hf.DisabledRepoError, f"{label}: disabled on {host}; take another repository"),
        (hf.RevisionNotFoundError, f"{label}: revision not found; check the name after the @"),
        (hf.EntryNotFoundError, f"{where}: {NO_FILE}"),
        (hf.SafetensorsParsingError, f"{where}: not a safetensors file; check the name or the revision"),
        (401, f"{label}: {host} does not accept the token; check HF_TOKEN"),
        (403, f"{label}: the token has no access; grant it at {host}/settings/tokens"),
    ):
        if kind == status or (isinstance(kind, type) and isinstance(error, kind)):
            return told
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        needed = f" of {format_bytes(file.size)}" if file and file.size else ""
        full = f"the disk of {into or constants.HF_HUB_CACHE} is full, the download{needed} stopped"
        return f"{where}: {full}; free some and {AGAIN}"
    reason = str(error).strip().partition("\n")[0] or "no reason given"
    what = f"{host} answers with HTTP {status}" if status else f"{type(error).__name__}: {reason}"
    return f"{where}: {what}; if the failure looks temporary, {AGAIN}"


def why_away(error: BaseException, host: str) -> str:
    """Return why the Hub did not answer and what to do, "" for any other failure."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to download"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{host} answers with HTTP {status}; later, {AGAIN}" if status == 429 or status >= 500 else ""
    if isinstance(error, HTTPError):
        broken = type(error).__name__ not in ("ConnectError", "ConnectTimeout")
        what = f"the connection to {host} was lost" if broken else f"there is no connection to {host}"
        return f"{what}; check the network and {AGAIN}"
    return ""
