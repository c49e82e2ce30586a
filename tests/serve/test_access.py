"""Access to a server: keys, hosts and origins, without a model."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from qmix.serve.app import make_app
from qmix.serve.errors import ApiError
from qmix.serve.guard import Access
from qmix.serve.metrics import Metrics
from qmix.serve.page import Page
from qmix.serve.server import is_local, listen, local_hosts
from qmix.serve.storage import Storage

HOST = {"host": "127.0.0.1:8000"}


def status(access: Access, path: str = "/v1/models", method: str = "GET", **headers: str) -> int:
    try:
        access.check(method, path, Headers({name.replace("_", "-"): value for name, value in headers.items()}))
    except ApiError as error:
        return error.status
    return 200


def test_a_key_is_wanted_everywhere_but_for_health():
    access = Access(key="secret", hosts=None)
    assert status(access, host="box") == 401
    assert status(access, "/health", host="box") == 200
    assert status(access, host="box", authorization="Bearer secret") == 200
    assert status(access, host="box", x_api_key="secret") == 200
    for wrong in ("Bearer secre", "Bearer secret2", "Basic secret", "secret", "Bearer é"):
        assert status(access, host="box", authorization=wrong) == 401
    assert status(access, "/metrics", host="box") == 401


def test_every_route_wants_the_key():
    """Whatever the method: nothing behind the guard is reached, not even an error about the path."""
    serving = SimpleNamespace(metrics=Metrics(None))
    routes = [*Storage(None, None, None).routes, *Page(None, lambda: True).routes]
    app = make_app(serving, Access(key="secret", hosts=None), routes)
    client = TestClient(app, raise_server_exceptions=False)
    paths = [route.path for route in routes if route.path != "/"]
    paths += ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"]
    paths += [
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/v1/nothing",
        "/health/",
        "/health/../metrics",
    ]
    assert client.get("/").status_code == 200  # the page, which holds no data
    for path in paths:
        for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT"):
            assert client.request(method, path).status_code == 401, (method, path)


def test_a_connection_whose_client_is_gone_or_reads_nothing_is_closed_by_the_system():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 300_000


def test_a_browser_may_ask_before_it_sends_a_key():
    access = Access(key="secret", hosts=None, origins=("http://page",))
    assert status(access, method="OPTIONS", host="box", origin="http://page") == 200
    assert status(access, method="OPTIONS", host="box", origin="http://other") == 403
    assert status(access, method="OPTIONS", host="box") == 401
    asks = {"host": "box", "origin": "http://page", "access_control_request_method": "POST"}
    assert status(access, method="POST", **asks) == 401


def test_a_local_server_answers_to_local_names_alone():
    access = Access(hosts=local_hosts("127.0.0.1"))
    for host in ("127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "LOCALHOST:1"):
        assert status(access, host=host) == 200, host
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert status(access, host=host) == 403, host


def test_pages_of_other_origins_are_refused_unless_they_are_named():
    access = Access(origins=("http://localhost:3000",))
    assert status(access, host="localhost:8000", origin="http://localhost:8000") == 200
    assert status(access, host="localhost:8000", origin="http://localhost:3000") == 200
    for origin in ("http://evil.example", "null", "http://localhost:3001"):
        assert status(access, host="localhost:8000", origin=origin) == 403, origin


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("box", False)])
def test_which_addresses_are_local(host, local):
    assert is_local(host) == local


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0: anybody on the network could use it; give --api-key KEY"),
        ("--insecure", "--insecure: only for another --host without a key; leave it out"),
        ("--cors *", "--cors *: must be an origin such as http://localhost:3000"),
        ("--ram 64MiB", "tiny: "),
        ("--context 100000", "--context 100000: must be 1 to 2048, the model's longest"),
        ("--kv-cache 100", "--kv-cache 100: must be at least the --context, 2048"),
    ],
)
def test_the_command_refuses_what_is_unsafe_or_too_small(qmix, options, told):
    done = qmix("serve", "tiny", "--port", "0", *options.split())
    assert (done.status, done.out) == (3 if "--ram" in options else 2, "")
    assert done.lines[-1].startswith(f"qmix: {told}") or ("--ram" in options and "does not fit" in done.lines[-1])


def test_a_port_in_use_is_told_before_the_model_is_loaded(qmix, server):
    port = server.url.rpartition(":")[2]
    done = qmix("serve", "tiny", "--port", port)
    assert done.status == 1
    assert done.lines[-1] == f"qmix: 127.0.0.1:{port}: Address already in use; choose another --port"


def test_a_directory_that_cannot_be_written_is_told_before_the_model_is_loaded(qmix):
    done = qmix("serve", "tiny", "--port", "0", "--directory", "/proc/nothing")
    assert (done.status, done.out) == (1, "")
    assert done.lines[-1] == "qmix: /proc/nothing: No such file or directory; choose another --directory"


def test_a_key_from_the_environment(qmix):
    done = qmix("serve", "tiny", "--port", "0", "--context", "100000", "--host", "0.0.0.0", QMIX_API_KEY="k")
    assert "must be 1 to 2048" in done.lines[-1]
