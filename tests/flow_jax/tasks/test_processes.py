"""A flow trained in two processes gives the numbers of one process."""

import json
import os
import sys

import numpy as np
import pytest

from tests.paligemma_jax.mini import ROOT, arguments, train_main
from tests.together import coordinator, run_together

FLOW = str(ROOT / "configs/flow_2d.py")
RUN = {
    "total_steps": 3,
    "log_steps": 1,
    "eval_steps": 3,
    "checkpoint_steps": 3,
    "batch_size": 16,
    "optimizer.warmup_steps": 1,
    "model.width": 16,
    "model.depth": 2,
    "data.num_examples": 200,
    "data.threads": 0,
    "path.name": "cfm",
    "times": "stratified",
    "eval.num_samples": 20,
    "eval.draws": 1,
    "eval.validation_draws": 1,
    "eval.solver": "euler",
    "eval.num_steps": 2,
}
SECONDS = 600  # half a minute where nothing else runs


def logged(workdir) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_two_processes_in_micro_batches_train_as_one(tmp_path):
    """Noise, times and the exact coupling, which pairs rows of both."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with coordinator() as address:
        place = ("--progress=none", "--num_processes=2", f"--coordinator={address}")
        options = RUN | {"micro_batch": 8, "mesh.data": 2}
        commands = [
            [sys.executable, *arguments(tmp_path / "two", options, *place, f"--process_id={i}", config=FLOW)]
            for i in range(2)
        ]
        both = run_together(commands, tmp_path / "outputs", SECONDS, cwd=ROOT, env=environment)
    assert [status for status, _ in both] == [0, 0], "\n".join(output for _, output in both)
    train_main(tmp_path / "one", RUN | {"mesh.data": 1}, config=FLOW)
    assert len(logged(tmp_path / "one")) == 3
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-5)
