"""Quantise in a process of its own.

The quantiser's compiler and buffers would otherwise stay in the memory of the run that follows, and count against its
budget.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from qmix.checkpoint import Checkpoint
from qmix.errors import QmixError
from qmix.files import decode_json
from qmix.progress import OnProgress, Progress
from qmix.store.request import Message, Request

# `-m` would take a qmix that lies in the working directory, and its embedded model, for the one that runs
SAME_QMIX = (
    "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
    "runpy.run_module('qmix.store.child', run_name='__main__', alter_sys=True)"
)
INTERRUPTED = "interrupted; run the same command again to continue"


def quantize_in_child(
    checkpoint: Checkpoint,
    model: str | Path,
    precision: str | None,
    dtype: str | None,
    clip: bool,
    directory: Path,
    on_progress: OnProgress,
) -> None:
    request = Request(str(model), checkpoint.identity, str(directory), precision, dtype, clip)
    command = [
        sys.executable,
        "-c",
        SAME_QMIX,
        str(Path(__file__).parents[2]),
        msgspec.json.encode(request).decode(),
    ]
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
