"""Batches in shards: `qmix batch --shard` on several machines, and `qmix batch merge`."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess

import pytest
from command import COMMAND

from qmix.batch.lines import Requests
from qmix.batch.shards import Shard
from qmix.errors import UsageError

OPTIONS = ("-m", "tiny", "--ram", "1GiB", "--max-new-tokens", "4")
LINES = [{"id": f"line-{index}", "prompt": f"To install a package, {index}"} for index in range(7)]
SHARDS = ("1/3", "2/3", "3/3")


@pytest.fixture(scope="module")
def finished(commands, first_use, tmp_path_factory):
    """A directory with in.jsonl and the finished outputs of three shards."""
    place = tmp_path_factory.mktemp("shards")
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(first_use.cache))
        for shard in SHARDS:
            output = place / f"out-{shard[0]}.jsonl"
            done = commands("batch", place / "in.jsonl", "-o", output, *OPTIONS, "--shard", shard)
            assert done.status == 0, done.err
    return place


@pytest.fixture
def source(finished, tmp_path):
    """The input, in a directory that is the test's own, with the outputs of all shards."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "in.jsonl"


@pytest.fixture
def shards(source, tmp_path):
    """The outputs of three shards."""
    return [tmp_path / f"out-{shard[0]}.jsonl" for shard in SHARDS]


def answers(path) -> list[dict]:
    """The answers of a file, without the time at which its run began."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for each in found:
        if each["response"]:
            del each["response"]["body"]["created"]
    return found


def ids(path) -> list[str]:
    return [each["custom_id"] for each in answers(path)]


@pytest.mark.parametrize("of", [1, 2, 3, 9])
def test_each_request_is_in_one_shard_and_shards_are_of_a_size(source, of):
    with source.open("rb") as file:
        parts = [[entry.id for entry in Requests(file, Shard(index, of)).entries] for index in range(1, of + 1)]
    assert sorted(name for part in parts for name in part) == [line["id"] for line in LINES]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1", "1/2/3", "-1/3", "a/b", "1/9999999", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UsageError, match="must be I/N, with I from 1 to N"):
        Shard.parse(text)


def test_shards_together_are_what_one_run_answers(qmix, source, shards, tmp_path):
    """Also random choices: without --seed all shards have the same seed."""
    assert [ids(path) for path in shards] != [[], [], []]
    assert [sorted(ids(path)) for path in shards] == [
        ["line-0", "line-3", "line-6"],
        ["line-1", "line-4"],
        ["line-2", "line-5"],
    ]
    merged, whole = tmp_path / "merged.jsonl", tmp_path / "whole.jsonl"
    done = qmix("batch", "merge", shards[2], shards[0], shards[1], "-o", merged, "--order", source)
    assert (done.status, done.out, done.lines) == (0, "", [f"{merged}: 7 lines of 3 shards"])
    assert ids(merged) == [line["id"] for line in LINES]
    seed = json.loads((tmp_path / "merged.jsonl.qmix.json").read_text())["chosen"]["seed"]
    assert qmix("batch", source, "-o", whole, *OPTIONS, "--seed", str(seed)).status == 0
    texts = [
        {each["custom_id"]: each["response"]["body"]["choices"] for each in answers(path)} for path in (merged, whole)
    ]
    assert texts[0] == texts[1]


def test_without_an_order_one_shard_follows_the_other(qmix, shards, tmp_path):
    merged = tmp_path / "merged.jsonl"
    assert qmix("batch", "merge", *shards, "-o", merged).status == 0
    assert merged.read_bytes() == b"".join(path.read_bytes() for path in shards)


def test_a_run_without_shards_goes_on_with_the_merged_file(qmix, source, shards, tmp_path):
    merged = tmp_path / "merged.jsonl"
    qmix("batch", "merge", *shards, "-o", merged)
    before = merged.read_bytes()
    done = qmix("batch", source, "-o", merged, *OPTIONS, "--json")
    assert (done.status, json.loads(done.out)["resumed"]) == (0, 7), done.err
    assert merged.read_bytes() == before
    again = qmix("batch", "merge", *shards, "-o", merged)
    assert (again.status, again.lines) == (2, [f"qmix: {merged}: is there already; choose another name, or delete it"])


def test_more_shards_than_requests_leave_some_without_lines(qmix, source, tmp_path):
    source.write_text(json.dumps(LINES[0] | {"prompt": ""}) + "\n")
    paths = [tmp_path / f"{index}.jsonl" for index in (1, 2)]
    ends = [qmix("batch", source, "-o", path, *OPTIONS, "--shard", f"{path.stem}/2").status for path in paths]
    assert ends == [4, 0]
    done = qmix("batch", "merge", *paths, "-o", tmp_path / "all.jsonl")
    assert (done.status, done.lines) == (4, [f"{tmp_path / 'all.jsonl'}: 1 line of 2 shards, 1 error"])


def test_what_is_not_the_whole_of_one_run_is_refused(qmix, source, shards, tmp_path):
    one, two, three = shards
    merged = tmp_path / "merged.jsonl"

    def refusal(*paths, order=None) -> str:
        done = qmix("batch", "merge", *paths, "-o", merged, *(() if order is None else ("--order", order)))
        assert done.status == 2
        assert not merged.exists()
        return done.err

    assert "2/3: shards without a file" in refusal(one, three)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(one.read_bytes())
    (tmp_path / "copy.jsonl.qmix.json").write_bytes((tmp_path / "out-1.jsonl.qmix.json").read_bytes())
    assert f"{copy}: shard 1/3 is also in {one}; leave one out" in refusal(one, copy, two, three)
    assert f"{source}: not the answers of a shard" in refusal(source, two, three)
    assert f"{two}: is given twice" in refusal(one, two, two)
    manifests = {path: path.read_bytes() for path in tmp_path.glob("out-*.qmix.json")}
    assert "not the answers of a shard" in refusal(one, *manifests)  # as a pattern of the shell gives them
    assert manifests == {path: path.read_bytes() for path in manifests}
    assert f"{tmp_path / 'none'}: not found" in refusal(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(LINES[0]) + "\n")
    assert "--order: not the input of these shards" in refusal(*shards, order=other)
    two.write_bytes(two.read_bytes().splitlines(keepends=True)[0])
    assert f"{two}: 1 line of shard 2/3 not answered; run its command again" in refusal(*shards)
    hot = tmp_path / "hot.jsonl"
    assert qmix("batch", source, "-o", hot, *OPTIONS, "--shard", "2/3", "--temperature", "2").status == 0
    differs = f"{hot}: is of another run than the first file (--temperature null, now 2.0); answer its shard again"
    assert differs in refusal(one, hot, three)


def test_a_full_disk_leaves_no_merged_file_and_nothing_beside_it(shards, tmp_path):
    merged = tmp_path / "merged.jsonl"
    size = sum(path.stat().st_size for path in shards)
    full = subprocess.run(
        [*COMMAND, "batch", "merge", *shards, "-o", merged],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (full.returncode, full.stderr.startswith(f"qmix: {merged}: File too large")) == (1, True), full.stderr
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_the_output_of_a_shard_is_not_that_of_another(qmix, source, shards):
    done = qmix("batch", source, "-o", shards[0], *OPTIONS, "--shard", "2/3")
    assert done.status == 2
    assert 'shard "1/3", now "2/3"' in done.err
