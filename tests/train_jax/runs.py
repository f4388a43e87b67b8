"""Runs the toy task with `train.py`, in this process or a subprocess, and reads its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from tests.train_jax.toy_task import PATH
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config import command_line

ROOT = Path(__file__).parents[2]
CONFIG = f"""
from train_jax.config import base_config

def get_config():
    return base_config({PATH!r})
"""


def arguments(workdir: Path, config: dict, *more: str) -> list[str]:
    """Returns the command line of a run; `config` has changes by dotted key."""
    file = workdir.parent / "toy.py"
    file.write_text(CONFIG)
    overrides = [f"--config.{key}={value}" for key, value in config.items()]
    return [str(ROOT / "train.py"), f"--config={file}", f"--workdir={workdir}", *overrides, *more]


def command(workdir: Path, config: dict, *more: str) -> list[str]:
    """Returns the command of `train.py` for a subprocess."""
    return [sys.executable, *arguments(workdir, config, *more)]


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a subprocess, with JAX's settings of this process (`fast_runs`)."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def start(workdir: Path, config: dict, *more: str) -> subprocess.Popen:
    """Runs `train.py` in a subprocess with 8 devices."""
    return subprocess.Popen(
        command(workdir, config, *more),
        env=environment(8),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=workdir.parent,
    )


def fails(capsys, workdir: Path, config: dict, *more: str) -> tuple[int, str]:
    """Runs `train.py` in this process; returns its exit status and the one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command_line.run(train.main, arguments(workdir, config, *more))
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("train.py")]
    assert len(lines) == 1
    return stopped.value.code, lines[0]


def metrics(workdir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def logged(workdir: Path, name: str = "loss") -> dict[int, float]:
    """Returns one metric by step; each step must occur once."""
    values = [(record["step"], record[name]) for record in metrics(workdir) if name in record]
    assert len(dict(values)) == len(values)
    return dict(values)


def stored(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by item and path."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    items = [item for item in ("params", "ema", "opt_state") if (workdir / "checkpoints" / str(step) / item).is_dir()]
    result = {item: checkpoints.restore_params(step, item=item) for item in items}
    checkpoints.close()
    return {f"{item}:{path}": np.asarray(leaf) for item, tree in result.items() for path, leaf in tree.items()}


def steps_kept(workdir: Path) -> list[int]:
    """Returns the steps with checkpoints."""
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


def assert_same_run(workdir: Path, other: Path, step: int, **tolerance: float) -> None:
    """Asserts equal losses at every step and equal state at `step`, exactly or within `tolerance` (rtol, atol)."""
    losses, others = logged(workdir), logged(other)
    assert losses.keys() == others.keys()
    arrays, expected = stored(workdir, step), stored(other, step)
    assert arrays.keys() == expected.keys()
    if tolerance:
        np.testing.assert_allclose(list(losses.values()), list(others.values()), **tolerance)
        for path, array in arrays.items():
            np.testing.assert_allclose(array, expected[path], **tolerance, err_msg=path)
    else:
        assert losses == others
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
