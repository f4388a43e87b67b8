"""Several processes of this machine as one run."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GRACE = 120  # seconds that the others have once one has failed, whom they may wait for much longer


@contextlib.contextmanager
def coordinator() -> Iterator[str]:
    """An address for process 0 to listen at, which nobody else is given until it does.

    The port stays bound here, without listening: gRPC asks the system to share its port, as this socket does.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def run_together(commands: Sequence[list[str]], folder: Path, seconds: float, **options: Any) -> list[tuple[int, str]]:
    """Runs commands side by side; status and output of each. None survives the call.

    Args:
      commands: one a process.
      folder: takes their outputs; a pipe that nobody reads would stop whoever fills it, and with it all others.
      seconds: after which those that are left are killed (status -9).
      options: of `subprocess.Popen`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"process_{i}.txt" for i in range(len(commands))]
    processes = []
    try:
        for command, file in zip(commands, files, strict=True):
            with file.open("wb") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options))
        _wait(processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, file.read_text(errors="replace")) for process, file in zip(processes, files, strict=True)
    ]


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    """Returns when all have ended, at the deadline, or `GRACE` after the first that failed."""
    failed = False
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if None not in statuses:
            return
        if any(statuses) and not failed:
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.1)
