"""Times programs in turns, so that other work on the machine slows all of them alike.

Each is a process that does one repetition when it is told (peers/turns.py). A peer runs in the first environment that
has its packages: those of the interpreters in BENCHMARK_PEERS, separated by commas, and then this one.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results import ROOT, Measurement, NotInstalledError

PEERS = "BENCHMARK_PEERS"
IDLE = 0.2  # seconds in which the threads of the other program go to sleep
FOUND = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
GIB = 2**30


class Program(NamedTuple):
    """A program of benchmarks/peers and what it imports.

    Attributes:
      module: its name.
      needs: packages; none of a program that runs in this environment.
      same_weights: whether it reads the weights of the folder, so that its first result equals ours.
    """

    module: str
    needs: Sequence[str] = ()
    same_weights: bool = False

    def interpreter(self) -> str:
        """Returns the first interpreter that has the packages. Raises NotInstalledError if none has."""
        given = [python for python in os.environ.get(PEERS, "").split(",") if python and self.needs]
        for python in (*given, sys.executable):
            if subprocess.run([python, "-c", FOUND, *self.needs], cwd=ROOT).returncode == 0:
                return python
        raise NotInstalledError(", ".join(self.needs))

    def command(self, folder: Path, work: str) -> list[str]:
        """Returns the command that starts the program. Raises NotInstalledError."""
        return [self.interpreter(), "-m", f"benchmarks.peers.{self.module}", str(folder), work]


class Peer(NamedTuple):
    """A program that ours is compared with, and the aims of its time and its peak memory over ours."""

    program: Program
    time: str = ""
    memory: str = ""


class Times(NamedTuple):
    """Of a program: wall and CPU time of each round in seconds, the peak of its memory, and its first result."""

    seconds: np.ndarray
    cpu_seconds: np.ndarray
    peak_bytes: int
    result: Any


class Process:
    """A running program."""

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self._process.communicate()  # closes its input, which ends it

    def answer(self) -> dict[str, Any]:
        """Reads a line. Raises RuntimeError if the program ended; its own error is on standard error."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{shlex.join(self._process.args)} ended, exit status {self._process.wait()}")
        return json.loads(line)

    def repeat(self) -> dict[str, Any]:
        """Does a repetition and returns its times."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()


def in_turns(commands: Sequence[Sequence[str]], rounds: int) -> list[Times]:
    """Times some programs, each once a round, in an order that turns."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(command)) for command in commands]
        first = [process.answer() for process in processes]
        replies: list[list[dict[str, Any]]] = [[] for _ in processes]
        for number in range(rounds):
            for index in np.roll(range(len(processes)), number):
                time.sleep(IDLE)
                replies[index].append(processes[index].repeat())
    return [
        Times(
            np.array([reply["seconds"] for reply in each]),
            np.array([reply["cpu_seconds"] for reply in each]),
            each[-1]["peak_bytes"],
            start["result"],
        )
        for start, each in zip(first, replies, strict=True)
    ]


def beside(ours: Program, peers: Mapping[str, Peer], folder: Path, work: str, rounds: int) -> list[Measurement]:
    """Compares a work of ours with that of peers: medians with quartiles, ratios of a round's times, and peak memory.

    Args:
      ours: the program that the aims are about.
      peers: by name.
      folder: of the model.
      work: its name.
      rounds: repetitions of each program.
    """
    absent, installed = [], {}
    for name, peer in peers.items():
        try:
            installed[name] = peer.program.command(folder, work)
        except NotInstalledError as error:
            absent.append(Measurement("time", math.nan, "s", of=name, needs=str(error)))
    own, *others = in_turns([ours.command(folder, work), *installed.values()], rounds)
    found = [measured("time", own.seconds, "s"), Measurement("peak memory", own.peak_bytes / GIB, "GiB")]
    found = [dataclasses.replace(one, of="ours") for one in found]
    for name, other in zip(installed, others, strict=True):
        peer = peers[name]
        if peer.program.same_weights:
            np.testing.assert_allclose(own.result, other.result, rtol=1e-3)
        of_peer = [
            measured("time", other.seconds, "s"),
            measured("time over ours", other.seconds / own.seconds, "", peer.time),
            measured("CPU time over ours", other.cpu_seconds / own.cpu_seconds, ""),
            Measurement("peak memory", other.peak_bytes / GIB, "GiB"),
            Measurement("memory over ours", other.peak_bytes / own.peak_bytes, "", peer.memory),
        ]
        found += [dataclasses.replace(one, of=name) for one in of_peer]
    return found + absent


def measured(name: str, values: np.ndarray, unit: str, aim: str = "") -> Measurement:
    """Returns the median of repeated measurements with its quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Measurement(name, median, unit, aim, (low, high))
