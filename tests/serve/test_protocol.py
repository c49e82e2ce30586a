"""The head of a request has a bound, on real connections."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from qmix.serve.protocol import HEAD_LIMIT, MOST_HEADERS

GET, POST = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
CHUNKED = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
PART = b"a" * 65536


def sent(url: str, head: bytes, part: bytes, most: int) -> tuple[int, bytes]:
    """Send a head, then a part again and again until the server answers; return the bytes of parts, and the answer."""
    address, count = urlsplit(url), 0
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        try:
            connection.sendall(head)
            while count < most:
                connection.sendall(part)
                count += len(part)
                time.sleep(0.001)
        except OSError:  # the server has closed it
            pass
        try:
            return count, connection.recv(65536)
        except ConnectionResetError:
            return count, b""


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (GET + b"X-Endless: ", PART),
        (b"GET /", PART),
        (GET, b"X: y\r\n" * 2000),
        (POST + CHUNKED + b"0\r\nX-Endless: ", PART),
        (POST + CHUNKED + b"2\r\n{}\r\n1;", PART),
    ],
    ids=["header", "address", "headers", "trailer", "chunk extension"],
)
def test_an_endless_head_is_cut_off(server, head, part):
    count, answer = sent(server.url, head, part, 64 * HEAD_LIMIT)
    assert count < 64 * HEAD_LIMIT
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_headers_have_a_number_and_large_ones_pass(server):
    headers = {f"x-{index}": "a" * 300 for index in range(MOST_HEADERS - 10)}
    assert httpx.get(f"{server.url}/health", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/health", headers=headers | {f"y-{index}": "" for index in range(20)}).is_error


def test_a_body_in_small_chunks_passes(server):
    """Its framing is larger than a head may be."""
    body = b'{"prompt": "Click", "max_tokens": 1, "user": "' + b"u" * 30_000 + b'"}'
    parts = (body[start : start + 1] for start in range(len(body)))
    answer = httpx.post(
        f"{server.url}/v1/completions", content=parts, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 200, answer.text


def test_two_requests_on_one_connection_are_both_answered(server):
    """The second one comes before the first is answered."""
    with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=60) as connection:
        connection.sendall((GET + b"\r\n") * 2)
        answer = b""
        while answer.count(b"HTTP/1.1 200 OK") < 2 or not answer.endswith(b"}"):
            answer += connection.recv(65536)
