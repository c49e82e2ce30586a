"""`python -m qmix.store.child REQUEST`: quantises in its own process, with progress as JSON on stdout."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import msgspec

from qmix.checkpoint import open_checkpoint
from qmix.errors import CheckpointError, QmixError
from qmix.files import decode_json
from qmix.progress import Progress
from qmix.store.quantize import quantize
from qmix.store.request import Message, Request
from qmix.store.sources import layout_for, open_source

REPORT_SECONDS = 0.1


def main() -> None:
    request = decode_json(sys.argv[1].encode(), Request, "the request", QmixError)
    reported = 0.0

    def report(progress: Progress) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_SECONDS or progress.done == progress.total or not progress.done:
            reported = time.monotonic()
            try:
                _say(Message(progress.done, progress.total, progress.note))
            except BrokenPipeError:  # who asked for it is gone
                raise KeyboardInterrupt from None

    try:
        checkpoint = open_checkpoint(open_source(request.model))
        if checkpoint.identity != request.identity:
            raise CheckpointError(f"{request.model}: changed while qmix was starting; run the same command again")
        layout = layout_for(checkpoint, request.precision, request.dtype, request.clip)
        quantize(checkpoint, Path(request.directory), layout, report)
    except QmixError as error:
        _say(Message(error=error.message, exit_code=error.exit_code))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(130)


def _say(message: Message) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
