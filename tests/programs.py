"""Programs of a user whose ranks a launcher starts, run in a process of their own.

A fork copies what all other tests have left in theirs, and ranks that hang are ended with the program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

_OF_A_LAUNCH = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
"""Variables that tests in this process may leave, and that would make the program a rank of theirs."""


def run_program(module: str, *arguments: str, **environment: str) -> str:
    """What `python -m module arguments` prints, with `environment` added. Fails unless it ends well within 90 s."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            output, _ = program.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, output
    return output
