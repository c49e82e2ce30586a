"""Names on the hub, what a repository holds, and the headers of its shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_checks import COMMIT, SHARDS, told
from hub_server import HubServer
from safetensors.numpy import save_file

from qmix.checkpoint.hub import HubRepo, parse
from qmix.checkpoint.hub_calls import HubFile

pytest_plugins = ["hub_fixtures"]

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
    code = "import sys, qmix.checkpoint.hub; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) == b"False\n"


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
