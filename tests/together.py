"""Runs several processes on this machine as one run."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GRACE = 120  # seconds until the other processes are killed after one has failed


@contextlib.contextmanager
def coordinator() -> Iterator[str]:
    """Yields an address for process 0 whose port no other program can take.

    The port stays bound by a socket that does not listen; gRPC can still use it, since both set SO_REUSEPORT.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def run_together(commands: Sequence[list[str]], folder: Path, seconds: float, **options: Any) -> list[tuple[int, str]]:
    """Runs commands in parallel; returns status and output of each. No process outlives the call.

    Args:
      commands: one for each process.
      folder: for their outputs; with pipes, one that is not read would block its process and thus all others.
      seconds: time limit after which the remaining processes are killed (status -9).
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
    """Returns when all have ended, at the deadline, or `GRACE` seconds after the first failure."""
    failed = False
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if None not in statuses:
            return
        if any(statuses) and not failed:
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.1)
