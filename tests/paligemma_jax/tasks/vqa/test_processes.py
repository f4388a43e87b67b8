"""A run of visual question answering in two processes: the numbers of one."""

import json
import os
import sys

import numpy as np
import pytest

from tests.paligemma_jax.mini import ROOT, arguments, read_lines, train_main
from tests.together import coordinator, run_together

RUN = {
    "total_steps": 2,
    "log_steps": 1,
    "eval_steps": 2,
    "checkpoint_steps": 2,
    "mesh.data": 2,
    "eval.question_only": False,
    "eval.before": False,
    "eval.candidates": "yes|no|2",
    "adapter.dropout": 0.3,
}
SECONDS = 1200  # one minute where nothing else runs


def run_both(workdir, options: dict) -> None:
    """`train.py` in two processes of one device each."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with coordinator() as address:
        place = ("--progress=none", "--num_processes=2", f"--coordinator={address}")
        commands = [[sys.executable, *arguments(workdir, options, *place, f"--process_id={i}")] for i in range(2)]
        both = run_together(commands, workdir.parent / "outputs", SECONDS, cwd=ROOT, env=environment)
    assert [status for status, _ in both] == [0, 0], "\n".join(output for _, output in both)


@pytest.mark.timeout(SECONDS + 600)
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
