"""Merge the answers of all shards of a file of requests into one file. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from qmix.batch.lines import Requests
from qmix.batch.output import (
    COMPUTED_ON,
    SHARD,
    FileAnswers,
    Manifest,
    answer_of,
    differences,
    manifest_path,
    write_manifest,
)
from qmix.batch.shards import Shard
from qmix.disk.faults import disk_advice
from qmix.errors import DiskError, UsageError, arg
from qmix.files import written_whole
from qmix.units import plural

AT_ONCE = 2**20  # bytes that are copied together
NOT_A_SHARD = "give the outputs of `qmix batch` with a shard each"


@dataclass(frozen=True, slots=True)
class Merged:
    """The result: shards, their lines, and the errors among these."""

    shards: int
    lines: int
    refused: int


def merge_shards(paths: Sequence[Path], output: Path, requests: Requests | None = None) -> Merged:
    """Write the answers of all shards to `output`, in the order of `requests` if given, else shard after shard.

    A later run without shards takes the output for its own. Raises UsageError where a shard is missing, unfinished or
    of another run, and where there is an output already; DiskError where the disk fails.
    """
    if output.exists() and (not output.is_file() or output.stat().st_size):
        raise UsageError(f"{output}: is there already; choose another name, or delete it")
    if twice := [path for index, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:index]}]:
        raise UsageError(f"{twice[0]}: is given twice; leave one out")
    with ExitStack() as stack:
        shards = [stack.enter_context(_opened(path)) for path in paths]
        whole = _checked(shards, requests)
        try:
            write_manifest(manifest_path(output), whole.subject, msgspec.structs.asdict(whole.chosen), whole.lines)
            with written_whole(output) as file:
                for data in _copies(shards) if requests is None else _in_order(shards, requests):
                    file.write(data)
        except OSError as error:
            manifest_path(output).unlink(missing_ok=True)
            raise DiskError(f"{output}: {error.strerror}; {disk_advice(error)}") from None
        return Merged(len(shards), whole.lines, sum(shard.refused for shard in shards))


def _opened(path: Path) -> FileAnswers:
    if not path.is_file():
        raise UsageError(f"{path}: not found; {NOT_A_SHARD}")
    if not manifest_path(path).is_file():
        raise UsageError(f"{path}: not the answers of a shard; {NOT_A_SHARD}")
    return FileAnswers(path)


def _checked(shards: Sequence[FileAnswers], requests: Requests | None) -> Manifest:
    """Return what the answers of all shards belong to, once none is missing, unfinished or of another run."""
    found: dict[Shard, FileAnswers] = {}
    processors = set[str]()  # machines may differ: each answer is of one
    first: Manifest | None = None
    lines = 0
    for answers in shards:
        manifest = answers.known()
        if manifest is None or not isinstance(named := manifest.subject.pop(SHARD, None), str):
            raise UsageError(f"{answers.path}: not the answers of a shard; {NOT_A_SHARD}")
        processors.add(str(manifest.subject.pop(COMPUTED_ON, "")))
        shard = Shard.parse(named)
        if shard in found:
            raise UsageError(f"{answers.path}: shard {shard} is also in {found[shard].path}; leave one out")
        if len(answers.done) < manifest.lines:
            left = plural(manifest.lines - len(answers.done), "line")
            raise UsageError(f"{answers.path}: {left} of shard {shard} not answered; run its command again")
        first = first or manifest
        _check_same_run(answers, shard, manifest, first, next(iter(found), shard))
        found[shard] = answers
        lines += manifest.lines
    assert first is not None
    of = next(iter(found)).of
    if missing := [str(shard) for index in range(1, of + 1) if (shard := Shard(index, of)) not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(f"{' '.join(missing[:3])}{more}: shards without a file; {NOT_A_SHARD}, all of them")
    if requests is not None and requests.digest != first.subject.get("input"):
        raise UsageError(f"{arg('order')}: not the input of these shards; give the file that they answered")
    return Manifest(first.subject | {COMPUTED_ON: " and ".join(sorted(processors))}, first.chosen, lines)


def _check_same_run(answers: FileAnswers, shard: Shard, manifest: Manifest, first: Manifest, other: Shard) -> None:
    differs = differences(first.subject, manifest.subject)
    if shard.of != other.of:
        differs = f"{arg('shard')} {shard}, where the first is {other}"
    elif not differs and manifest.chosen.seed != first.chosen.seed:
        differs = f"seed {first.chosen.seed}, now {manifest.chosen.seed}"
    if differs:
        raise UsageError(f"{answers.path}: is of another run than the first file ({differs}); answer its shard again")


def _copies(shards: Iterable[FileAnswers]) -> Iterator[bytes]:
    for shard in shards:
        with shard.path.open("rb") as file:
            while data := file.read(AT_ONCE):
                yield data


def _in_order(shards: Sequence[FileAnswers], requests: Requests) -> Iterator[bytes]:
    """Yield the answers in the order of their requests; only their places are in memory."""
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for shard in shards:
            file = stack.enter_context(shard.path.open("rb"))
            offset = 0
            for raw in file:
                places[answer_of(raw, str(shard.path)).custom_id] = file, offset
                offset += len(raw)
        for entry in requests.entries:
            source, offset = places[entry.id]
            source.seek(offset)
            yield source.readline()
