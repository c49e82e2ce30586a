"""Mend a damaged store: read only the damaged weights from the checkpoint, quantise and write them in place.

A run that is killed leaves damaged parts damaged and touches no other. New parts have the checksums that the store was
made with, or the run fails.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix.checkpoint import Checkpoint, open_checkpoint
from qmix.disk.direct import DirectFile
from qmix.disk.faults import disk_advice
from qmix.errors import REMAKE, CheckpointError, StoreError, UsageError, arg
from qmix.files import read_json, write_whole
from qmix.models import EMBEDDED
from qmix.progress import OnProgress, Progress, ignore
from qmix.store.layout import StoreLayout
from qmix.store.manifest import CONFIG, MANIFEST, Manifest, layout_of, read_manifest, small_digest, small_digests
from qmix.store.opened import ORIGIN, PROFILE, Origin
from qmix.store.parts import parts_of, recheck
from qmix.store.places import Unit, units_of
from qmix.store.small_files import small_files
from qmix.store.sources import open_source
from qmix.store.verify import MISSING, STRANGE, Damage, Verification, verify_store
from qmix.store.weight_run import WeightRun, write_error
from qmix.store.writer import UnitWriter

ASIDE = ".aside"  # suffix of a file that does not belong to the store
NAME_IT = f"give the checkpoint with {arg('source')}"


@dataclass(frozen=True)
class Mended:
    """The damage that was found and mended; `units` is how many were rewritten from `source`."""

    found: Verification
    units: int
    source: str | None


def mend(
    directory: Path, source: str | None = None, on_verify: OnProgress = ignore, on_mend: OnProgress = ignore
) -> Mended:
    """Verify a store and rewrite what is damaged from its checkpoint.

    `source` is the checkpoint's place if it has moved. Raises StoreError where the checkpoint is gone or is another.
    """
    with _held(directory):
        content, found = read_manifest(directory / MANIFEST)
        checkpoint, layout = None, None
        if not _config_is_well(directory, content, found):
            checkpoint = _checkpoint(directory, found, source)
            layout = layout_of(directory, found, checkpoint.config)
        verification = verify_store(directory, on_verify, layout)
        if verification.is_lost:
            raise StoreError(f"{directory / MANIFEST}: belongs to other files than these; {REMAKE}")
        of_weights = _put_small_files_right(directory, content, found, verification.damages, checkpoint, source)
        if not of_weights:
            return Mended(verification, 0, None)
        checkpoint = checkpoint or _checkpoint(directory, found, source)
        layout = layout or layout_of(directory, found, checkpoint.config)
        try:
            units = _write_anew(directory, found, checkpoint, layout, of_weights, on_mend)
        except OSError as error:
            raise write_error(error, directory, layout) from error
        return Mended(verification, units, checkpoint.source.name)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Keep other processes from mending the same store."""
    try:
        file = (directory / MANIFEST).open("r+b")
    except OSError as error:
        raise StoreError(f"{directory / MANIFEST}: {error.strerror}; {disk_advice(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{directory}: another qmix process is repairing it; wait until it ends") from None
        yield


def _config_is_well(directory: Path, content: dict[str, Any], found: Manifest) -> bool:
    try:
        return small_digest(content, (directory / CONFIG).read_bytes()) == small_digests(content, found).get(CONFIG)
    except OSError:
        return False


def _checkpoint(directory: Path, found: Manifest, source: str | None) -> Checkpoint:
    """Open the checkpoint of a store. Raises StoreError where it is gone or has become another."""
    location = source or _location(directory, found)
    try:
        checkpoint = open_checkpoint(open_source(location))
    except (CheckpointError, UsageError) as error:
        reason = error.message.removeprefix(f"{location}: ").split(";")[0]
        raise StoreError(
            f"{directory}: the checkpoint that it was made from, {location}, cannot be used ({reason}); {NAME_IT}"
        ) from None
    known = checkpoint.known_fingerprint
    if known is not None and known != found.source.fingerprint and found.checksums.files:
        raise StoreError(f"{location}: is another checkpoint than the one that {directory} was made from; {NAME_IT}")
    return checkpoint


def _location(directory: Path, found: Manifest) -> str:
    """Return the checkpoint's place when the store was made; an embedded model is where qmix is now."""
    path = directory / ORIGIN
    location = read_json(path, Origin, StoreError, NAME_IT).location if path.exists() else None
    if found.source.name in EMBEDDED and (location is None or not Path(location).is_dir()):
        return found.source.name
    if location is None:
        raise StoreError(f"{directory}: does not say where its checkpoint, {found.source.name}, is; {NAME_IT}")
    return location


def _put_small_files_right(
    directory: Path,
    content: dict[str, Any],
    found: Manifest,
    damages: Sequence[Damage],
    checkpoint: Checkpoint | None,
    source: str | None,
) -> list[Damage]:
    """Copy damaged small files again, set strange files aside, and return the damages of weight files."""
    known = small_digests(content, found)
    try:
        for name in [damage.file for damage in damages if damage.what == STRANGE or damage.file == PROFILE]:
            (directory / name).replace(directory / f"{name}{ASIDE}")
        lost = [damage.file for damage in damages if damage.file in known]
        if lost:
            checkpoint = checkpoint or _checkpoint(directory, found, source)
            files = small_files(checkpoint.config, checkpoint.tokenizer_files())
            for name in lost:
                if name not in files or small_digest(content, files[name]) != known[name]:
                    raise StoreError(
                        f"{checkpoint.source.name}: its {name} is not the one that {directory} was made with; "
                        f"{NAME_IT} that has it"
                    )
                write_whole(directory / name, files[name])
    except OSError as error:
        raise StoreError(f"{error.filename or directory}: {error.strerror}; {disk_advice(error)}") from None
    return [damage for damage in damages if damage.file.endswith(".safetensors")]


def _write_anew(
    directory: Path,
    found: Manifest,
    checkpoint: Checkpoint,
    layout: StoreLayout,
    damages: Sequence[Damage],
    on_progress: OnProgress,
) -> int:
    """Rewrite the damaged parts from the checkpoint, and return how many.

    Raises StoreError where they come out other than the store was made with.
    """
    missing = {damage.file for damage in damages if damage.part is None and damage.why == MISSING}
    units = {damage.part.unit for damage in damages if damage.part is not None and damage.part.unit}
    units |= {name for name, unit in units_of(layout).items() if unit.file.name in missing}
    with closing(_Patch(directory, layout, units, {damage.file for damage in damages})) as patch:
        run = WeightRun(checkpoint, patch, layout, on_progress)
        before, total = run.done, run.total
        run.on_progress = lambda progress: on_progress(Progress(progress.done - before, total - before, progress.note))
        run.run()
        patch.flush()
    parts = [part for part in parts_of(layout, found) if part.unit in units]
    if wrong := [part.unit for part in parts if recheck(directory / part.file, part) is not None]:
        raise StoreError(
            f"{checkpoint.source.name}: its weights are not the ones that {directory} was made from "
            f"({', '.join(wrong[:3])}); {NAME_IT}, or {REMAKE}"
        )
    return len(units)


class _Patch(UnitWriter):
    """Rewrites some units of a finished store. `names` are the files with damaged parts, header or length."""

    def __init__(self, directory: Path, layout: StoreLayout, units: set[str], names: set[str]) -> None:
        all_units = units_of(layout)
        whole = all_units.keys() - units
        super().__init__({key: "" for name in whole for key in all_units[name].keys}, dict.fromkeys(whole, ""))
        try:
            for file in (file for file in layout.files if file.name in names):
                opened = self._files[file.name] = DirectFile(directory / file.name, os.O_RDWR | os.O_CREAT)
                if os.fstat(opened.fd).st_size != file.size:
                    os.ftruncate(opened.fd, file.size)
                self.write(file, file.header, 0)
                os.fdatasync(opened.fd)
            for name in all_units.keys() & units:
                self._blank(all_units[name])
        except BaseException:
            self._release()
            raise

    def _blank(self, unit: Unit) -> None:
        """Zero the bytes between a unit's parts and behind them."""
        position = unit.offset
        for begin, end in [*((part.offset, part.offset + part.nbytes) for part in unit.parts), (unit.end, unit.end)]:
            if begin > position:
                self.write(unit.file, bytes(begin - position), position)
            position = end
