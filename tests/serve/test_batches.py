"""Files and batches through OpenAI's client; a killed server goes on where it was."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path

import openai
import pytest
from conftest import Running

CHAT = "/v1/chat/completions"


def lines(count: int, tokens: int = 8, url: str = CHAT) -> bytes:
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line-{index}",
                "method": "POST",
                "url": url,
                "body": {
                    "messages": [{"role": "user", "content": f"Open file {index}"}],
                    "max_tokens": tokens,
                    "temperature": 0,
                },
            }
        ).encode()
        + b"\n"
        for index in range(count)
    )


def start(client: openai.OpenAI, content: bytes):
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def ended(client: openai.OpenAI, name: str):
    for _ in range(6000):  # a busy machine is waited for
        batch = client.batches.retrieve(name)
        if batch.status not in ("in_progress", "cancelling"):
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def answers(client: openai.OpenAI, file: str) -> dict[str, dict]:
    return {line["custom_id"]: line for line in map(json.loads, client.files.content(file).text.splitlines())}


def test_a_batch_is_answered_with_errors_in_a_file_of_their_own(client):
    long = {"messages": [{"role": "user", "content": "a " * 3000}]}
    bad = {"custom_id": "n", "method": "POST", "url": CHAT, "body": long}
    batch = ended(client, start(client, lines(5) + json.dumps(bad).encode()).id)
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 6, 5, 1)
    got = answers(client, batch.output_file_id)
    for index in range(5):
        alone = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"Open file {index}"}], max_tokens=8, temperature=0
        )
        message = got[f"line-{index}"]["response"]["body"]["choices"][0]["message"]
        assert message["content"] == alone.choices[0].message.content
    assert list(answers(client, batch.error_file_id)) == ["n"]
    described = client.files.retrieve(batch.output_file_id)
    assert (described.purpose, described.bytes) == (
        "batch_output",
        len(client.files.content(batch.output_file_id).content),
    )
    assert batch.id in {each.id for each in client.batches.list(limit=1)}


def test_a_line_that_the_engine_refuses_fails_alone(client):
    wrong = json.loads(lines(1)) | {"custom_id": "wrong"}
    wrong["body"]["logit_bias"] = {"99999": 1}
    batch = ended(client, start(client, lines(2) + json.dumps(wrong).encode()).id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 1)
    assert "99999 is not a token id" in answers(client, batch.error_file_id)["wrong"]["error"]["message"]


def test_a_batch_waits_while_the_disk_has_no_room(server: Running, client):
    """A limit on the size of files stands for a full disk. Uploads are refused, and nothing of them stays."""
    file = client.files.create(file=("requests.jsonl", lines(20)), purpose="batch")
    before = kept(server)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while not (waiting := client.batches.retrieve(batch.id)).errors:
            time.sleep(0.05)
        assert waiting.status == "in_progress"
        assert "File too large" in waiting.errors.data[0].message
        with pytest.raises(openai.InternalServerError, match="the server's disk: File too large") as caught:
            client.files.create(file=("requests.jsonl", lines(200)), purpose="batch")
        assert caught.value.status_code == 507
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    done = ended(client, batch.id)
    assert (done.status, done.request_counts.completed, done.errors) == ("completed", 20, None)
    assert sorted(answers(client, done.output_file_id)) == sorted(f"line-{index}" for index in range(20))
    client.files.delete(done.output_file_id)
    assert kept(server) - before == {f"{batch.id}.json"}


def kept(server: Running) -> set[str]:
    """The names of a server's files."""
    (directory,) = (Path(server.home) / "state/qmix/serve").iterdir()
    return {path.name for path in directory.iterdir()}


def test_wrong_files_fail_with_the_reason(client):
    for content, told in (
        (b"{}\n", "line 1: "),
        (lines(1, url="/v1/completions"), "line 1: "),
        (b"\n", "the file has no requests"),
        (b"{}\n" * 20_001, "the file has more than 20000 lines; split it"),
    ):
        batch = ended(client, start(client, content).id)
        assert batch.status == "failed"
        assert batch.errors.data[0].message.startswith(told)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-" + "0" * 24, endpoint=CHAT, completion_window="24h")
    for name in ("..%2f..%2fetc%2fpasswd", "file-../../lock", "lock"):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(name)
    with pytest.raises(openai.BadRequestError, match="purpose 'fine-tune'"):
        client.files.create(file=("a", b"b"), purpose="fine-tune")


def test_files_are_listed_and_deleted(client):
    file = client.files.create(file=("../../name.jsonl", b"x" * 2_000_000), purpose="batch")
    assert client.files.content(file.id).content == b"x" * 2_000_000
    assert client.files.retrieve(file.id).filename == "../../name.jsonl"
    assert file.id in {each.id for each in client.files.list()}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_a_cancelled_batch_keeps_what_it_has(client):
    batch = start(client, lines(300, tokens=200))
    while client.batches.retrieve(batch.id).request_counts.completed == 0:
        time.sleep(0.05)
    client.batches.cancel(batch.id)
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    assert 0 < done.request_counts.completed < 300
    assert len(answers(client, done.output_file_id)) == done.request_counts.completed


@pytest.mark.slow
def test_a_killed_server_goes_on_with_its_batches(places, model, tmp_path):
    options = ("--directory", str(tmp_path / "kept"), "--batch", "4", "--ram", "1100MiB")
    first = Running.start(tmp_path, places, model, *options)
    client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="none")
    batch = start(client, lines(60, tokens=60))
    while client.batches.retrieve(batch.id).request_counts.completed < 5:
        time.sleep(0.02)
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    (output,) = (tmp_path / "kept").glob("batch-*.out.jsonl")
    before = output.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    assert before.count(b"\n") >= 5

    second = Running.start(tmp_path, places, model, *options)
    client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="none")
    done = ended(client, batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", 60)
    assert client.files.content(done.output_file_id).content.startswith(before)
    assert len(answers(client, done.output_file_id)) == 60
    assert second.stop() == 130
    assert second.messages.read_text().splitlines()[-1] == "qmix: interrupted"
