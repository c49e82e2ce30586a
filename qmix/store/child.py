"""Quantise in a process of its own: both ends of it, and the messages between them.

The quantiser's compiler and buffers would otherwise stay in the memory of the run that follows, and count against its
budget. The calling process loads no torch for it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from qmix.checkpoint import Checkpoint, open_checkpoint
from qmix.disk.places import cache_directory, use_cache_directory
from qmix.errors import CheckpointError, QmixError
from qmix.files import decode_json
from qmix.progress import OnProgress, Progress
from qmix.store.opened import SHARDS, partial_directory
from qmix.store.sources import layout_for, open_source
from qmix.units import UnitSystem

# `-m` would take a qmix that lies in the working directory, and its embedded model, for the one that runs
SAME_QMIX = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module('qmix.store.child', run_name='__main__', alter_sys=True)"
)
INTERRUPTED = "interrupted; run the same command again to continue"
REPORT_SECONDS = 0.1


class Request(msgspec.Struct, frozen=True):
    """A store to make from the checkpoint that had this `identity` when it was opened. `cache` is the user's,
    `binary` the unit system of messages.
    """

    model: str
    identity: str
    directory: str
    precision: str | None
    dtype: str | None
    clip: bool
    evict: bool
    cache: str
    binary: bool


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from the child: its Progress, or the error that ended it."""

    done: int = 0
    total: int = 0
    note: str = ""
    error: str = ""
    exit_code: int = 1


def quantize_in_child(
    checkpoint: Checkpoint,
    model: str | Path,
    precision: str | None,
    dtype: str | None,
    clip: bool,
    directory: Path,
    on_progress: OnProgress,
    evict: bool = False,
) -> None:
    """Make the store of a checkpoint in a process of its own. Raises QmixError, with the exit code of the child's.

    With `evict`, weight files from the Hub pass through a directory in the unfinished store, and are deleted after use.
    """
    cache = str(cache_directory())
    request = Request(
        str(model), checkpoint.identity, str(directory), precision, dtype, clip, evict, cache, UnitSystem.binary
    )
    command = [sys.executable, "-c", SAME_QMIX, str(Path(__file__).parents[2]), msgspec.json.encode(request).decode()]
    pipe = subprocess.PIPE
    # in a session of its own: a Ctrl-C reaches it once, from here, and not a second time while it is ending
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            for line in child.stdout:
                message = decode_json(line, Message, f"quantizing {model}", QmixError, "report this as a bug of qmix")
                if message.error:
                    error = QmixError(message.error)
                    error.exit_code = message.exit_code
                    raise error
                on_progress(Progress(message.done, message.total, message.note))
        except BaseException as error:
            child.send_signal(signal.SIGINT)  # it notes what it has finished, and ends
            child.wait()  # or the same command, given again at once, would find it writing
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(INTERRUPTED) from None
            raise
        complaint = child.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise QmixError(f"quantizing {model}: killed by {name}; run the same command again to continue")
    if child.returncode != 0:
        raise QmixError(f"quantizing {model} ended with status {child.returncode}: {''.join(complaint)}")


def main() -> None:
    """Run the Request in the last argument, with one Message a line on stdout."""
    from qmix.store.quantize import quantize  # loads torch

    request = decode_json(sys.argv[1].encode(), Request, "the request", QmixError)
    use_cache_directory(Path(request.cache))
    UnitSystem.binary = request.binary
    scratch = partial_directory(Path(request.directory)) / SHARDS if request.evict else None
    try:
        checkpoint = open_checkpoint(open_source(request.model, scratch))
        if checkpoint.identity != request.identity:
            raise CheckpointError(f"{request.model}: changed while qmix was starting; run the same command again")
        layout = layout_for(checkpoint, request.precision, request.dtype, request.clip)
        quantize(checkpoint, Path(request.directory), layout, _Report())
    except QmixError as error:
        _say(Message(error=error.message, exit_code=error.exit_code))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(130)


class _Report:
    """Progress as messages, a few a second. Interrupts the run if the calling process is gone."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._said > REPORT_SECONDS or progress.done == progress.total or not progress.done:
            self._said = time.monotonic()
            try:
                _say(Message(progress.done, progress.total, progress.note))
            except BrokenPipeError:
                raise KeyboardInterrupt from None


def _say(message: Message) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
