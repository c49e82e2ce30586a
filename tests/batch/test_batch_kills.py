"""Runs of `qmix batch` killed at random moments and begun again: the answers are those of a run that never was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from killed_batches import Batches, lines_of

PROMPTS = ("Click the button to", "To install a package,", "Das Programm wird", "Ouvrez le menu", "The file")


@pytest.fixture
def batches(first_use, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(first_use.cache))
    running = Batches({})
    yield running
    running.close()


def write_requests(path: Path, count: int) -> Path:
    """Short and long answers in both forms, to the same few prompts and others."""
    rng = random.Random(count)
    lines = []
    for index in range(count):
        prompt = f"{rng.choice(PROMPTS)} {index % 7}"
        body = {"max_tokens": rng.randint(2, 40), "temperature": 0, "ignore_eos": index % 5 == 0}
        if index % 3:
            lines.append({"id": f"line-{index}", "prompt": prompt, **body})
        else:
            body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 2}
            form = {"method": "POST", "url": "/v1/chat/completions"}
            lines.append({"custom_id": f"line-{index}", **form, "body": body})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, dict]:
    """By id, each there once; without the second in which the run was first begun."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["response"]["body"]["created"]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize(
    ("count", "kills"), [(20, 6), pytest.param(200, 50, marks=pytest.mark.slow)], ids=["twenty", "two hundred"]
)
def test_a_batch_killed_again_and_again_ends_equal_to_one_that_never_was(batches, tmp_path, count, kills):
    """In batches of another size each time."""
    requests = write_requests(tmp_path / "in.jsonl", count)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ("-m", "tiny", "--context", "256", "--seed", "1", "--ram", "1GiB")
    assert batches(whole, requests, *options) == 0
    rng = random.Random(kills)
    killed = 0
    while killed < kills:
        left = count - lines_of(cut) - 8  # so many may come before a kill is noticed
        lines = rng.randint(0, max(0, 2 * left // (kills - killed)))
        after = rng.uniform(0, 0.02) if lines else rng.uniform(0, 1.0 if left > 0 else 0.1)
        status = batches(cut, requests, *options, "--batch", str(rng.randint(1, 6)), after=after, lines=lines)
        if status == 0:  # it was done before it could be killed; begun anew, it has more moments
            assert answers(cut) == answers(whole)
            cut.unlink()
        else:
            assert status == -9
            killed += 1
    assert batches(cut, requests, *options) == 0
    assert answers(cut) == answers(whole)
    assert len(answers(whole)) == count
