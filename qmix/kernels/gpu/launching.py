"""Find out whether Triton can launch kernels on this machine's GPUs."""

from __future__ import annotations

import subprocess
from functools import cache

NEEDS = "install a C compiler and Python's headers (on Debian and Ubuntu: apt install gcc python3-dev)"


@cache
def launch_fault() -> str:
    """Return in a line why Triton cannot launch kernels here, and what to do; empty if it can.

    Triton builds a small module in C at its first launch. That takes a C compiler, Python's headers and the driver's
    library. What it has built it keeps on disk.
    """
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except subprocess.CalledProcessError:  # the compiler said why on stderr
        return f"Triton's C module does not compile; {NEEDS}"
    except Exception as error:  # of many types: no compiler, no library, no driver
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")[:200]
        return f"Triton cannot launch kernels: {reason}; {NEEDS}"
    return ""
