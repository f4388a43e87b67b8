"""eval.py on a user's data: memory does not depend on the number of questions, and results have their files."""

import json
import os
import subprocess
import sys

import pytest

import eval as eval_script
from tests.paligemma_jax.mini import CLEVR, ROOT, arguments, png, write_rows
from train_jax.config import command_line

pytestmark = pytest.mark.usefixtures("fast_compilation")
QUESTIONS = ("How many things are there?", "What color is the cube?", "Is there a ball?", "What is the size of it?")
SMALL, LARGE = 400, 1600
OWN_DATA = str(ROOT / "configs/own_data.py")
SETTINGS = {
    "data.prefix_length": 24,
    "data.suffix_length": 4,
    "eval.batch_size": 50,
    "eval.max_new_tokens": 2,
    "eval.feature_cache_mb": 0,
    "eval.candidates": "yes|2|red",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Folders of JSONL with N and 4N questions, four on each image."""
    folders = {}
    for count in (SMALL, LARGE):
        folder = folders[count] = tmp_path_factory.mktemp(f"rows{count}")
        for i in range(count // 4):
            (folder / f"{i}.png").write_bytes(png(i))
        lines = [
            {"image": f"{i // 4}.png", "prefix": f"answer en {QUESTIONS[i % 4]}", "suffix": ("2", "red", "yes")[i % 3]}
            for i in range(count)
        ]
        write_rows(folder, "train", lines[:8])
        write_rows(folder, "validation", lines)
    return folders


def evaluate(folder, workdir, options: dict) -> dict:
    """What `eval.py`, in a process of its own, leaves in eval.json about the base model on a folder's rows."""
    kept = {key: value for key, value in options.items() if not key.startswith("data.")}
    options = kept | SETTINGS | {"data.source": str(folder)}
    command = [sys.executable, str(ROOT / "eval.py"), *arguments(workdir, options, config=OWN_DATA)[1:]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "eval.json").read_text())


@pytest.mark.slow
def test_memory_of_an_evaluation_is_that_of_its_batches(mini_options, rows, tmp_path):
    """Generation, likelihoods, losses, ROUGE, the shuffled control; a batch before compiles, which takes memory."""
    evaluate(rows[SMALL], tmp_path / "compiled", mini_options | {"eval.max_examples": 50})
    result = {count: evaluate(folder, tmp_path / str(count), mini_options) for count, folder in rows.items()}
    assert [result[count]["examples"] for count in rows] == [SMALL, LARGE]
    assert all(result[count]["accuracy_shuffled"] is not None for count in rows)
    growth = result[LARGE]["peak_memory_bytes"] - result[SMALL]["peak_memory_bytes"]
    assert abs(growth) < 50 * 2**20


def test_a_base_model_is_evaluated_into_a_folder_of_its_own(mini_options, tmp_path, monkeypatch, capsys):
    """Without --workdir: runs/<config>-base below the working directory, never the folder of the run itself."""
    monkeypatch.chdir(tmp_path)
    options = mini_options | {"eval.controls": False, "eval.before": False, "eval.candidates": ""}
    words = arguments(None, options, config=CLEVR)[1:]
    command_line.run(eval_script.main, ["eval.py", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["clevr-base"]
    results = json.loads((tmp_path / "runs/clevr-base/eval.json").read_text())
    assert results["step"] == 0 and results["examples"] == 20
    assert (tmp_path / "runs/clevr-base/predictions.jsonl").is_file()
