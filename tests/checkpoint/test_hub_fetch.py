"""Files from the hub, to the shared cache or one by one into a folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_checks import COMMIT, SHARDS, below
from hub_server import HubServer
from huggingface_hub import constants

from qmix.checkpoint.hub import HubRepo
from qmix.errors import Cancelled

pytest_plugins = ["hub_fixtures"]

# Fetching to the shared cache.


def test_fetch_keeps_the_file_in_the_shared_cache(hub: HubServer, model: Path, cache: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    for name in (SHARDS[0], "extra/notes.txt"):
        path = repo.fetch(name)
        assert path == cache / "models--org--name" / "snapshots" / COMMIT / name
        assert path.read_bytes() == (model / name).read_bytes()
    assert (cache / "models--org--name" / "refs" / "main").read_text() == COMMIT
    hub.forget()
    assert repo.fetch(SHARDS[0]).read_bytes() == (model / SHARDS[0]).read_bytes()
    assert hub.requests == []


def test_a_moved_branch_does_not_mix_commits(hub: HubServer, cache: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    repo.fetch("config.json")
    hub.revisions = {"main": "dead" + "0" * 36, "old": COMMIT}
    assert repo.fetch(SHARDS[0]).parent.name == COMMIT
    assert HubRepo.open("org/name", endpoint=hub.url).fetch("config.json").parent.name == "dead" + "0" * 36
    assert (cache / "models--org--name" / "refs" / "main").read_text() == "dead" + "0" * 36


def test_progress_counts_the_bytes(hub: HubServer, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500_000)
    repo = HubRepo.open("org/name", endpoint=hub.url)
    size = repo.files[2].size
    seen: list[tuple[int, int]] = []
    repo.fetch(SHARDS[0], into=into, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(500_000, size), (1_000_000, size), (size, size)]
    repo.fetch(SHARDS[1], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (size, size)


def test_progress_can_stop_a_download(hub: HubServer, into: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise Cancelled

    repo = HubRepo.open("org/name", endpoint=hub.url)
    with pytest.raises(Cancelled):
        repo.fetch(SHARDS[0], into=into, progress=stop)
    assert below(into) == []


# Fetching one by one.


def test_one_by_one_leaves_nothing_behind(hub: HubServer, model: Path, cache: Path, into: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    for name in [*SHARDS, "extra/notes.txt"]:
        path = repo.fetch(name, into=into)
        assert path == into / name
        assert path.read_bytes() == (model / name).read_bytes()
        assert below(into) == [name]
        repo.evict(path, into)
        assert list(into.iterdir()) == []
    assert not cache.exists()
    assert len(hub.gets()) == 3


def test_evict_deletes_one_of_several(hub: HubServer, into: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    paths = [repo.fetch(name, into=into) for name in SHARDS]
    repo.evict(paths[0], into)
    assert below(into) == [SHARDS[1]]
    repo.evict(paths[0], into)  # again
    assert below(into) == [SHARDS[1]]


def test_what_the_shared_cache_has_is_used_and_never_evicted(hub: HubServer, cache: Path, into: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    kept = repo.fetch(SHARDS[0])
    hub.forget()
    assert repo.fetch(SHARDS[0], into=into) == kept
    assert hub.requests == []
    assert not into.exists()
    for folder in (into, cache, cache.parents[1]):  # even where the cache lies below it
        repo.evict(kept, folder)
        assert kept.is_file()
    elsewhere = into.parent / "elsewhere.txt"
    elsewhere.write_text("mine")
    repo.evict(elsewhere, into)
    assert elsewhere.is_file()


def test_a_file_that_is_there_is_not_fetched_again_unless_it_is_damaged(hub: HubServer, into: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    path = repo.fetch(SHARDS[0], into=into)
    hub.forget()
    assert repo.fetch(SHARDS[0], into=into) == path
    assert hub.requests == []
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    assert repo.fetch(SHARDS[0], into=into).read_bytes() == good
    assert len(hub.gets(SHARDS[0])) == 1


def test_two_at_a_time(hub: HubServer, model: Path, into: Path) -> None:
    """As when the next shard is fetched while this one is in use."""
    repo = HubRepo.open("org/name", endpoint=hub.url)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda name: repo.fetch(name, into=into), SHARDS))
    assert [path.read_bytes() for path in paths] == [(model / name).read_bytes() for name in SHARDS]
    assert below(into) == SHARDS


def test_what_a_killed_run_left_is_cleared(hub: HubServer, into: Path) -> None:
    left = into / f".{SHARDS[0]}.part" / ".cache" / "huggingface" / "download" / "x.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    seen: list[bool] = []
    repo = HubRepo.open("org/name", endpoint=hub.url)
    repo.fetch(SHARDS[0], into=into, progress=lambda done, total: seen.append(left.exists()))
    assert seen == [False]  # before the disk has to hold the file itself
    assert below(into) == [SHARDS[0]]
