"""A budget that a refusal names works at once: for every command that has one, with and without a store made before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Commands

TASKS = Path(__file__).parents[1] / "evaluation"
LINES = [{"id": "a", "prompt": "Click the button to", "max_tokens": 3}, {"id": "b", "prompt": "To print " * 40}]
COMMANDS = {
    "generate": ("generate", "Click the", "--max-new-tokens", "2", "-m", "MODEL"),
    "generate, with a context": ("generate", "Click", "--context", "2048", "--max-new-tokens", "2", "-m", "MODEL"),
    "chat": ("chat", "MODEL", "--max-new-tokens", "2"),
    "batch": ("batch", "IN", "-o", "OUT", "-m", "MODEL", "--max-new-tokens", "40", "--temperature", "0"),
    "batch of several": ("batch", "IN", "-o", "OUT", "-m", "MODEL", "--batch", "2"),
    "bench": ("bench", "MODEL", "-p", "8", "-n", "2", "-r", "1"),
    "compare": ("compare", "MODEL", "--tokens", "64"),
    "calibrate": ("calibrate", "MODEL", "OUT", "--tokens", "64"),
    "eval": ("eval", "MODEL", "--data", str(TASKS), "--limit", "2", "-o", "OUT"),
    "eval of one kind": ("eval", "MODEL", "--data", str(TASKS), "--tasks", "help_words", "--limit", "1", "-o", "OUT"),
}


@pytest.fixture(scope="module")
def qmix(tmp_path_factory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("budgets"), "qmix.evaluate.report", "qmix.evaluate.tasks")
    yield running
    running.close()


LOOK_AT_ALL = ("batch", "eval")  # at every request, before a store is made
OFTEN = ("generate", "batch", "calibrate", "eval of one kind")
CASES = [
    pytest.param(name, made, marks=() if name in OFTEN else pytest.mark.slow)
    for made, names in ((True, COMMANDS), (False, LOOK_AT_ALL))
    for name in names
]


@pytest.mark.parametrize(("command", "made"), CASES)
def test_the_first_budget_that_is_named_works(qmix, first_use, tiny, tmp_path, monkeypatch, command, made):
    cache = tmp_path / "cache"
    (cache / "qmix").mkdir(parents=True)
    for path in (first_use.cache / "qmix").glob("interpreter-*.json"):  # what Python takes, measured before
        shutil.copy(path, cache / "qmix")
    model = "tiny" if made else str(shutil.copytree(tiny, tmp_path / "model"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(first_use.cache if made else cache))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    names = {"MODEL": model, "IN": str(tmp_path / "in.jsonl"), "OUT": str(tmp_path / "out")}
    argv = [names.get(word, word) for word in COMMANDS[command]]
    refused = qmix(*argv, "--ram", "50MiB", stdin=b"Hello\n")
    assert "is above the budget" not in refused.err  # which nothing was run under
    assert refused.status == 3, refused.err
    assert not list(cache.glob("qmix/*/")), "a store was made before the budget was refused"
    (named,) = re.findall(r"--ram (\d+MiB)", refused.lines[-1])
    done = qmix(*argv, "--ram", named, stdin=b"Hello\n")
    assert done.status == 0, done.err
