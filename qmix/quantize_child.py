"""`python -m qmix.quantize_child REQUEST`: quantises in its own process, with progress as JSON on stdout."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from qmix.checkpoint import open_checkpoint
from qmix.errors import QmixError
from qmix.prepare import layout_for, open_source
from qmix.progress import Progress
from qmix.quantize import quantize

REPORT_SECONDS = 0.1


def main() -> None:
    request = json.loads(sys.argv[1])
    reported = 0.0

    def report(progress: Progress) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_SECONDS or progress.done == progress.total:
            reported = time.monotonic()
            try:
                print(json.dumps(asdict(progress)), flush=True)
            except BrokenPipeError:  # who asked for it is gone
                raise KeyboardInterrupt from None

    try:
        checkpoint = open_checkpoint(open_source(request["model"]))
        layout = layout_for(checkpoint, request["precision"], request["dtype"], request["clip"])
        quantize(checkpoint, Path(request["directory"]), layout, report)
    except QmixError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(130)


if __name__ == "__main__":
    main()
