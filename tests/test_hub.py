"""The hub against a stand-in on loopback: each promise of qmix.hub, and each way in which a hub fails."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file

from qmix.errors import Cancelled, HubError
from qmix.hub import HubFile, HubRepo, parse

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
COMMIT = "c0ffee" + "0" * 34
KEPT = "run the same command again, files already done are kept"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own for huggingface_hub, which reads the environment only once; the cache in it."""
    home = tmp_path / "home"
    for name, value in {
        "HF_HOME": home,
        "HF_HUB_CACHE": home / "hub",
        "HF_TOKEN_PATH": home / "token",
        "HF_STORED_TOKENS_PATH": home / "stored_tokens",
        "AGENT_HARNESSES_PATH": home / "agents.json",
    }.items():
        monkeypatch.setattr(constants, name, str(value), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # connections to an earlier stand-in
    yield home / "hub"
    close_session()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of about 1.2 MB, and what goes with them."""
    root = tmp_path / "model"
    (root / "extra").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, name in enumerate(SHARDS):
        weights = rng.standard_normal((300, 1000), np.float32)
        tensors: dict[str, np.ndarray] = {f"w{index}": weights, f"b{index}": np.zeros(3, np.float16)}
        save_file(tensors, root / name, {"format": "pt"})
    (root / "config.json").write_text('{"model_type": "mixtral"}')
    (root / "extra" / "notes.txt").write_text("notes")
    return root


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer(model) as server:
        yield server


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the seconds between them."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into"


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def told(call: Callable[[], Any]) -> str:
    """The message of the HubError that `call` raises, which is one line."""
    with pytest.raises(HubError) as raised:
        call()
    message = str(raised.value)
    assert message.strip()
    assert "\n" not in message
    return message


# Names.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mistralai/Mixtral-8x22B-v0.1", ("mistralai/Mixtral-8x22B-v0.1", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/4", ("org/name", "refs/pr/4")),
        ("o/n@" + COMMIT, ("o/n", COMMIT)),
        ("a_b/c.d", ("a_b/c.d", None)),
        ("./a/b", None),
        ("../a", None),
        ("/abs/path", None),
        ("~/x", None),
        ("a/b/c", None),
        ("a/b/", None),
        ("name", None),
        ("", None),
        ("a/b@", None),
        ("a/b@x y", None),
        ("a/..", None),
        ("a/b..c", None),
        ("a/b--c", None),
        ("a/b.", None),
        ("a/b@../../x", None),
        ("a/b@/etc/x", None),
        ("C:\\models\\x", None),
    ],
)
def test_parse(text: str, found: tuple[str, str | None] | None) -> None:
    assert parse(text) == found


def test_import_is_cheap() -> None:
    code = "import sys, qmix.hub; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1]) == b"False\n"


# What a repository holds.


def test_open_lists_the_files(hub: HubServer, model: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url + "/")
    assert (repo.repo, repo.revision, repo.commit, repo.away) == ("org/name", None, COMMIT, "")
    assert [file.name for file in repo.files] == ["config.json", "extra/notes.txt", *SHARDS]
    assert repo.files[0] == HubFile("config.json", 25, None)
    shard = repo.files[2]
    assert shard.size == (model / shard.name).stat().st_size
    assert shard.sha256 is not None
    assert len(shard.sha256) == 64
    assert [request.path for request in hub.requests] == ["/api/models/org/name"]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/4", "dead" + "0" * 36])
def test_open_at_a_revision(hub: HubServer, revision: str) -> None:
    hub.revisions |= {"v1": "dead" + "0" * 36, "refs/pr/4": "dead" + "0" * 36}
    repo = HubRepo.open(f"org/name@{revision}", endpoint=hub.url)
    assert (repo.revision, repo.commit) == (revision, "dead" + "0" * 36)
    repo.headers(SHARDS)
    repo.fetch("config.json")
    assert [request.path.split("/")[4] for request in hub.gets()] == ["dead" + "0" * 36] * 3


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
        "bit": "came damaged (its sha256 is not the one the hub lists)",
        "size": f"came with {size - 7} bytes instead of {size}",
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
    assert message == (f"{SHARDS[0]} of org/name: the connection to {hub.url} broke off; check the network and {KEPT}")
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


# Headers.


def test_headers_without_the_weights(hub: HubServer, model: Path, cache: Path) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    hub.forget()
    found = repo.headers(SHARDS)
    for name in SHARDS:
        raw = (model / name).read_bytes()
        assert found[name] == json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert found[name]["__metadata__"] == {"format": "pt"}
        assert list(found[name]) == list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))
    assert {request.range for request in hub.requests} == {"bytes=0-100000"}
    assert sum(request.sent for request in hub.requests) == 2 * 100_001  # of 2.4 MB
    assert not cache.exists()
    repo.fetch(SHARDS[0])
    hub.forget()
    assert repo.headers(SHARDS[:1]) == {SHARDS[0]: found[SHARDS[0]]}
    assert hub.requests == []


def test_a_long_header_takes_two_requests(hub: HubServer, model: Path) -> None:
    save_file({f"{index:0100d}": np.zeros(1, np.float32) for index in range(1000)}, model / "long.safetensors")
    repo = HubRepo.open("org/name", endpoint=hub.url)
    header = repo.headers(["long.safetensors"])["long.safetensors"]
    assert len(header) == 1000
    assert header["0" * 99 + "7"] == {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}
    assert len(hub.gets()) == 2


def test_a_header_that_is_none(hub: HubServer) -> None:
    repo = HubRepo.open("org/name", endpoint=hub.url)
    assert told(lambda: repo.headers(["config.json"])) == (
        "config.json of org/name: not a safetensors file; check the name or the revision"
    )


# Who may read, and what is not there.


def test_the_token_is_sent_with_every_request(hub: HubServer, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    private = f"org/name: not on {hub.url}, or private; check the name, or set HF_TOKEN"
    assert told(lambda: HubRepo.open("org/name", endpoint=hub.url)) == private
    hub.forget()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    repo = HubRepo.open("org/name", endpoint=hub.url)
    repo.headers(SHARDS)
    repo.fetch(SHARDS[0], into=into)
    repo.fetch("config.json")
    assert len(hub.requests) == 7
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}


def test_a_gated_repository(hub: HubServer, into: Path) -> None:
    hub.token, hub.gated = "hf_secret", True
    repo = HubRepo.open("org/name@main", endpoint=hub.url)  # the listing is public
    message = f"org/name@main: gated; accept its licence at {hub.url}/org/name and set HF_TOKEN"
    assert told(lambda: repo.fetch(SHARDS[0])) == message
    assert told(lambda: repo.fetch(SHARDS[0], into=into)) == message
    assert told(lambda: repo.headers(SHARDS)) == message
    assert below(into) == []


def test_names_that_are_not_there(hub: HubServer) -> None:
    hub.missing.add("org/gone")
    assert told(lambda: HubRepo.open("org/gone", endpoint=hub.url)) == (
        f"org/gone: not on {hub.url}, or private; check the name, or set HF_TOKEN"
    )
    assert told(lambda: HubRepo.open("org/name@v9", endpoint=hub.url)) == (
        "org/name@v9: no such revision; check what stands after the @"
    )
    assert told(lambda: HubRepo.open("./a/b", endpoint=hub.url)) == (
        "'./a/b' is not a model on the hub; write org/name or org/name@revision"
    )
    repo = HubRepo.open("org/name", endpoint=hub.url)
    hub.forget()
    no_file = "tokenizer.json of org/name: no such file; check the name or the revision"
    assert told(lambda: repo.fetch("tokenizer.json")) == no_file
    assert told(lambda: repo.headers(["tokenizer.json"])) == no_file
    assert hub.requests == []
    (hub.root / "config.json").unlink()  # deleted on the hub since
    assert told(lambda: repo.fetch("config.json")) == (
        "config.json of org/name: no such file; check the name or the revision"
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "org/name: {url} does not accept the token; check HF_TOKEN"),
        ({"status": 403}, "org/name: the token may not read it; give it that right at {url}/settings/tokens"),
        (
            {"status": 403, "code": "GatedRepo"},
            "org/name: gated; accept its licence at {url}/org/name and set HF_TOKEN",
        ),
        (
            {"status": 404, "code": "RepoNotFound"},
            "org/name: not on {url}, or private; check the name, or set HF_TOKEN",
        ),
        ({"status": 418}, "org/name: {url} answers with HTTP 418; if it seems passing, " + KEPT),
    ],
)
def test_refusals(hub: HubServer, fault: dict[str, Any], message: str) -> None:
    hub.fault("/api/*", **fault)
    assert told(lambda: HubRepo.open("org/name", endpoint=hub.url)) == message.format(url=hub.url)


def test_another_host_that_holds_the_files_gets_no_token(
    hub: HubServer, model: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token, hub.cdn = "hf_secret", True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    repo = HubRepo.open("org/name", endpoint=hub.url)
    assert set(repo.headers(SHARDS[:1])[SHARDS[0]]) == {"__metadata__", "w0", "b0"}
    assert repo.fetch(SHARDS[0], into=into).read_bytes() == (model / SHARDS[0]).read_bytes()
    elsewhere = [request for request in hub.requests if request.path == f"/cdn/{SHARDS[0]}"]
    assert [(request.range, request.authorization) for request in elsewhere] == [
        ("bytes=0-100000", None),
        (None, None),
    ]


# Quiet, and through the environment.


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


def test_through_the_environment(hub: HubServer, tmp_path: Path) -> None:
    """Endpoint, token, home and offline mode as a user sets them; only the script itself prints."""
    hub.token = "hf_secret"
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from qmix.errors import Cancelled, HubError
        from qmix.hub import HubRepo

        try:
            repo = HubRepo.open("org/name")
            print(repo.commit, len(repo.files))
            print(repo.fetch(sys.argv[1]).relative_to(sys.argv[2]).parts[:2])
            print(repo.fetch("config.json", into=Path(sys.argv[2], "into")).name)
        except HubError as error:
            print(error)
        """
    )
    home = tmp_path / "own home"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    set_by_user = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret"}

    def run(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, SHARDS[0], str(home)],
            env=kept | set_by_user | more,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    assert run() == f"{COMMIT} 4\n('hub', 'models--org--name')\nconfig.json\n"
    hub.forget()
    assert run(HF_HUB_OFFLINE="1") == (
        f"{COMMIT} 1\n('hub', 'models--org--name')\n"
        "config.json of org/name: not in the cache, and HF_HUB_OFFLINE is set; unset it to download\n"
    )
    assert hub.requests == []
    assert run(HF_TOKEN="hf_other") == (f"org/name: not on {hub.url}, or private; check the name, or set HF_TOKEN\n")
