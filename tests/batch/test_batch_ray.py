"""Batches on a Ray cluster: blocks answered by a worker, and a whole run whose worker dies."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qmix.batch.ray_data import Answerer, answer_file
from qmix.errors import UsageError

LINES = [{"id": f"line-{index}", "prompt": f"To install a package, {index}", "max_tokens": 4} for index in range(5)]
RAM = "1300MiB"  # of a worker: this process has all of the tests in memory
CLUSTER = """
import json, sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from qmix.batch.ray_data import answer_file

STORE = 100 * 2**20  # bytes of shared memory of a node
source, output, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
ray.init(address=cluster.address, logging_level="ERROR")


def on_answers(done, lines):
    if nodes and done < lines:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.clear()
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        print("a node died after", done)


try:
    print(json.dumps(answer_file(source, output, workers=2, block=4, on_answers=on_answers, **options)))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path) -> dict[str, dict]:
    """The answers of a file by id, each of which is there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def test_a_block_is_answered_as_the_lines_of_a_batch(qmix, tmp_path):
    source = written(tmp_path / "in.jsonl", [*LINES, {"id": "refused", "prompt": ""}])
    output, manifest = tmp_path / "out.jsonl", tmp_path / "out.jsonl.qmix.json"
    assert qmix("batch", source, "-o", output, "-m", "tiny", "--ram", "1GiB", "--top-p", "0.9").status == 4
    known = json.loads(manifest.read_text())
    worker = Answerer("tiny", ram=RAM, digest=known["subject"]["input"], chosen=known["chosen"], top_p=0.9)
    lines = [json.dumps(line) for line in (*LINES, {"id": "refused", "prompt": ""})]
    order = [3, 5, 0, 4, 1, 2]
    found = {}
    for some in (order[:2], order[2:]):
        columns = worker({"text": [lines[index] for index in some], "number": [index + 1 for index in some]})
        assert all(json.loads(subject) == known["subject"] for subject in columns["subject"])
        found |= dict(zip(columns["custom_id"], map(json.loads, columns["answer"]), strict=True))
    assert found == answers(output)


def test_lines_that_are_no_requests_are_refused(tmp_path, qmix):
    with pytest.raises(UsageError, match=r"in.jsonl: line 2: unknown field 'temprature'"):
        answer_file(written(tmp_path / "in.jsonl", [LINES[0], LINES[1] | {"temprature": 1}]), tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="has no requests"):
        answer_file(written(tmp_path / "in.jsonl", []), tmp_path / "out.jsonl")
    other = written(tmp_path / "other.jsonl", LINES[:1])
    assert qmix("batch", other, "-o", tmp_path / "kept.jsonl", "-m", "tiny", "--ram", "1GiB").status == 0
    with pytest.raises(UsageError, match="has answers to another input"):
        answer_file(written(tmp_path / "in.jsonl", [LINES[0] | {"prompt": "y"}]), tmp_path / "kept.jsonl")
    with pytest.raises(UsageError, match="line 1 is not an answer"):
        answer_file(tmp_path / "in.jsonl", tmp_path / "in.jsonl")
    with pytest.raises(UsageError, match="No such file"):
        answer_file(tmp_path / "none", tmp_path / "out.jsonl")


@pytest.mark.slow
def test_a_node_that_dies_is_replaced_and_nothing_is_answered_twice(qmix, first_use, tmp_path):
    pytest.importorskip("ray.data")
    lines = [{"id": f"{index}", "prompt": f"To install package {index}", "max_tokens": 6} for index in range(48)]
    source, output, whole = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    options = json.dumps({"model": "tiny", "ram": "1GiB", "seed": 5})
    script = [sys.executable, "-c", CLUSTER, source, output, options]
    run = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    told = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line for line in told if line.startswith("a node died")]
    assert "[48, 0]" in told
    assert qmix("batch", source, "-o", whole, "-m", "tiny", "--ram", "1GiB", "--seed", "5").status == 0
    found, want = answers(output), answers(whole)
    assert found.keys() == want.keys()
    for name, each in want.items():
        assert found[name]["response"]["body"]["choices"] == each["response"]["body"]["choices"]
    again = qmix("batch", source, "-o", output, "-m", "tiny", "--ram", "1GiB", "--seed", "5", "--json")
    assert json.loads(again.out)["resumed"] == 48
