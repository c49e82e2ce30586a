"""Each way in which a download, or the hub itself, fails; and that all this is quiet."""

from __future__ import annotations

import errno
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_checks import COMMIT, KEPT, SHARDS, below, told
from hub_server import HubServer
from huggingface_hub import constants

from qmix.checkpoint.hub import HubRepo
from qmix.checkpoint.hub_calls import HubFile

pytest_plugins = ["hub_fixtures"]

# Downloads that go wrong.


@pytest.mark.parametrize("where", ["into", "shared"])
@pytest.mark.parametrize("harm", ["bit", "size"])
def test_a_damaged_download_is_refused(hub: HubServer, cache: Path, into: Path, where: str, harm: str) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    size = repo.files[2].size
    assert size is not None
    if harm == "bit":
        hub.fault(f"*/{SHARDS[0]}", flip_at=1_000_000)
    else:
        hub.fault(f"*/{SHARDS[0]}", cut=7, times=2)
    folder = into if where == "into" else None
    wrong = {
        "bit": "is damaged (its sha256 is not the one that the Hub lists)",
        "size": f"has {size - 7} bytes instead of {size}",
    }[harm]
    message = told(lambda: repo.fetch(SHARDS[0], into=folder))
    assert message == f"{SHARDS[0]} of org/name: {wrong} and was deleted; {KEPT}"
    assert below(into) == []
    assert [name for name in below(cache) if "/blobs/" in name or "/snapshots/" in name] == []
    assert repo.fetch(SHARDS[0], into=folder).stat().st_size == size


def test_a_broken_download_is_resumed(
    hub: HubServer, model: Path, into: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    repo = HubRepo.open("org/name", endpoint=hub.url)
    hub.fault(f"*/{SHARDS[0]}", break_at=750_000)
    seen: list[int] = []
    path = repo.fetch(SHARDS[0], into=into, progress=lambda done, total: seen.append(done))
    assert [request.range for request in hub.gets()] == [None, "bytes=700000-"]
    assert path.read_bytes() == (model / SHARDS[0]).read_bytes()
    assert seen == sorted(seen)
    assert seen[-1] == repo.files[2].size


@pytest.mark.parametrize("fault", [{"break_at": 750_000, "reset": True}, {"status": 500, "method": "GET"}])
def test_what_huggingface_hub_does_not_retry_is_retried(
    hub: HubServer, model: Path, into: Path, no_pauses: None, fault: dict[str, Any]
) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    hub.fault(f"*/{SHARDS[0]}", **fault)
    assert repo.fetch(SHARDS[0], into=into).read_bytes() == (model / SHARDS[0]).read_bytes()
    assert len(hub.gets()) == 2


@pytest.mark.parametrize("path", ["/api/models/*", "*/resolve/*"])
def test_one_error_of_the_server_is_survived(hub: HubServer, no_pauses: None, path: str) -> None:
    hub.fault(path, status=500)
    repo = HubRepo.open("org/name", endpoint=hub.url)
    assert set(repo.headers([SHARDS[0]])) == {SHARDS[0]}
    assert repo.fetch("config.json").is_file()
    assert repo.away == ""


def test_a_download_that_stays_broken_says_how_to_go_on(hub: HubServer, into: Path, no_pauses: None) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    hub.fault(f"*/{SHARDS[0]}", break_at=1000, times=math.inf)
    message = told(lambda: repo.fetch(SHARDS[0], into=into))
    assert message == (f"{SHARDS[0]} of org/name: the connection to {hub.url} was lost; check the network and {KEPT}")
    assert below(into) == []


@pytest.mark.parametrize("where", ["into", "shared"])
def test_a_full_disk(hub: HubServer, cache: Path, into: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    repo = HubRepo.open("org/name", endpoint=hub.url)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    folder, place = (into, into) if where == "into" else (None, cache)
    assert told(lambda: repo.fetch(SHARDS[0], into=folder)) == (
        f"{SHARDS[0]} of org/name: the disk of {place} is full, the download of 1.2 MB stopped; free some and {KEPT}"
    )
    assert below(into) == []


def test_a_folder_that_cannot_be_written_to(hub: HubServer, into: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    into.write_text("a file where the folder should be")
    message = told(lambda: repo.fetch("config.json", into=into))
    assert message.startswith("config.json of org/name: ")
    assert str(into) in message


# Without the hub.


def test_offline_from_the_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch, into: Path) -> None:
    online = HubRepo.open("org/name", endpoint=hub.url)
    path = online.fetch(SHARDS[0])
    online.fetch("extra/notes.txt")
    headers = online.headers(SHARDS[:1])
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = HubRepo.open("org/name", endpoint=hub.url)
    assert (repo.commit, repo.revision) == (COMMIT, None)
    assert repo.files == tuple(file for file in online.files if file.name in (SHARDS[0], "extra/notes.txt"))
    assert repo.fetch(SHARDS[0]) == repo.fetch(SHARDS[0], into=into) == path
    assert repo.headers(SHARDS[:1]) == headers
    assert HubRepo.open(f"org/name@{COMMIT}", endpoint=hub.url).files == repo.files
    unset = "HF_HUB_OFFLINE is set; unset it to download"
    missing = f"{SHARDS[1]} of org/name: not in the cache, and {unset}"
    assert told(lambda: repo.fetch(SHARDS[1])) == missing
    assert told(lambda: repo.headers(SHARDS)) == missing
    assert told(lambda: online.fetch(SHARDS[1], into=into)) == f"{SHARDS[1]} of org/name: {unset}"
    where = f"not in the cache ({constants.HF_HUB_CACHE})"
    assert told(lambda: HubRepo.open("org/other")) == f"org/other: {where}, and {unset}"
    assert told(lambda: HubRepo.open("org/name@v2")) == f"org/name@v2: {where}, and {unset}"
    assert hub.requests == []


def test_offline_with_a_part_of_a_snapshot(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hf download` leaves it with --include, or when it is interrupted."""
    folder = Path(huggingface_hub.snapshot_download("org/name", endpoint=hub.url, revision="main"))
    (folder / SHARDS[1]).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = HubRepo.open("org/name")
    assert [file.name for file in repo.files] == ["config.json", "extra/notes.txt", SHARDS[0]]


def test_without_a_connection_the_cache_serves(hub: HubServer, into: Path, no_pauses: None) -> None:
    HubRepo.open("org/name", endpoint=hub.url).fetch(SHARDS[0])
    online = HubRepo.open("org/name", endpoint=hub.url)
    hub.close()
    repo = HubRepo.open("org/name", endpoint=hub.url)
    why = f"there is no connection to {hub.url}; check the network and {KEPT}"
    assert (repo.commit, repo.away) == (COMMIT, why)
    assert repo.fetch(SHARDS[0]).is_file()
    assert told(lambda: repo.fetch(SHARDS[1])) == f"{SHARDS[1]} of org/name: not in the cache, and {why}"
    assert told(lambda: online.fetch(SHARDS[1], into=into)) == f"{SHARDS[1]} of org/name: {why}"
    assert told(lambda: online.headers(SHARDS[1:])) == f"{SHARDS[1]} of org/name: {why}"
    where = f"not in the cache ({constants.HF_HUB_CACHE})"
    assert told(lambda: HubRepo.open("org/x", endpoint=hub.url)) == f"org/x: {where}, and {why}"


def test_a_hub_that_is_down_is_as_good_as_none(hub: HubServer, no_pauses: None) -> None:
    HubRepo.open("org/name", endpoint=hub.url).fetch("config.json")
    hub.fault("/api/*", status=503, times=math.inf)
    repo = HubRepo.open("org/name", endpoint=hub.url)
    assert repo.away == f"{hub.url} answers with HTTP 503; later, {KEPT}"
    assert repo.files == (HubFile("config.json", 25, None),)


# Quiet.


def test_nothing_is_printed_and_nothing_stays_muted(
    hub: HubServer,
    into: Path,
    no_pauses: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    heard: list[logging.LogRecord] = []
    logger = logging.getLogger("huggingface_hub")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", heard.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.setLevel(logging.WARNING)
    filters = list(warnings.filters)
    hub.fault("*/resolve/*", status=500, times=2)  # huggingface_hub logs these as warnings
    repo = HubRepo.open("org/name", endpoint=hub.url)
    repo.headers(SHARDS)
    repo.fetch(SHARDS[0], into=into)
    repo.fetch("config.json")
    hub.fault(f"*/{SHARDS[1]}", break_at=0, times=math.inf)
    told(lambda: repo.fetch(SHARDS[1], into=into))
    assert capfd.readouterr() == ("", "")
    assert heard == []
    assert (logger.level, list(warnings.filters)) == (logging.WARNING, filters)
