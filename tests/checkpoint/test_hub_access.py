"""Access to the Hub: tokens, missing files, and what a user sets in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hub_checks import COMMIT, KEPT, SHARDS, below, told
from hub_server import HubServer

from qmix.checkpoint.hub import HubRepo

pytest_plugins = ["hub_fixtures"]

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
        "org/name@v9: revision not found; check the name after the @"
    )
    assert told(lambda: HubRepo.open("./a/b", endpoint=hub.url)) == (
        "'./a/b' is not a model on the Hub; write org/name or org/name@revision"
    )
    repo = HubRepo.open("org/name", endpoint=hub.url)
    hub.forget()
    no_file = "tokenizer.json of org/name: file not found; check the name or the revision"
    assert told(lambda: repo.fetch("tokenizer.json")) == no_file
    assert told(lambda: repo.headers(["tokenizer.json"])) == no_file
    assert hub.requests == []
    (hub.root / "config.json").unlink()  # deleted on the hub since
    assert told(lambda: repo.fetch("config.json")) == (
        "config.json of org/name: file not found; check the name or the revision"
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "org/name: {url} does not accept the token; check HF_TOKEN"),
        ({"status": 403}, "org/name: the token has no access; grant it at {url}/settings/tokens"),
        (
            {"status": 403, "code": "GatedRepo"},
            "org/name: gated; accept its licence at {url}/org/name and set HF_TOKEN",
        ),
        (
            {"status": 404, "code": "RepoNotFound"},
            "org/name: not on {url}, or private; check the name, or set HF_TOKEN",
        ),
        ({"status": 418}, "org/name: {url} answers with HTTP 418; if the failure looks temporary, " + KEPT),
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


# Through the environment.


def test_through_the_environment(hub: HubServer, tmp_path: Path) -> None:
    """Endpoint, token, home and offline mode as a user sets them; only the script itself prints."""
    hub.token = "hf_secret"
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from qmix.errors import Cancelled, HubError
        from qmix.checkpoint.hub import HubRepo

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
            cwd=Path(__file__).parents[2],
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
