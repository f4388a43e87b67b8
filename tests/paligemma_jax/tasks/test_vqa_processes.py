"""A run of visual question answering in two processes: the numbers of one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.paligemma_jax.mini import ROOT, arguments, read_lines, train_main

RUN = {
    "total_steps": 2,
    "log_steps": 1,
    "eval_steps": 2,
    "checkpoint_steps": 2,
    "mesh.data": 2,
    "eval.question_only": False,
    "eval.before": False,
    "eval.candidates": "yes|no|2",
    "adapter.dropout": 0.0,
}
SECONDS = 500


def run_both(workdir, options: dict) -> None:
    """`train.py` in two processes of one device each; none survives the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    place = ("--progress=none", "--num_processes=2", f"--coordinator=127.0.0.1:{port}")
    both = [
        subprocess.Popen(
            [sys.executable, *arguments(workdir, options, *place, f"--process_id={i}")],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_two_processes_train_and_evaluate_as_one(mini_options, tmp_path):
    """With features encoded once, so that the processes share that work as well."""
    options = mini_options | RUN | {"cache_features": True}
    run_both(tmp_path / "two", options)
    train_main(tmp_path / "one", options)
    two, one = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, value in one.items():
        if isinstance(value, float) and name != "seconds":
            np.testing.assert_allclose(two[name], value, rtol=1e-3, err_msg=name)
    two, one = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("two", "one"))
    for row, expected in zip(two, one, strict=True):
        np.testing.assert_allclose(row.pop("nll"), expected.pop("nll"), rtol=1e-3)
        assert row == expected
