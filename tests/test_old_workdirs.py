"""Workdirs of earlier releases can be read, evaluated and resumed, with the same digits.

A run with dropout draws other masks since commit 4e3566a, so the test of its digits puts the former masks in place.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import eval as eval_script
import train
from paligemma_jax.adapt.lora import layer as lora_layer
from paligemma_jax.models import paligemma
from tests.paligemma_jax.mini import read_lines
from train_jax.config.base import base_config, from_json, task_class, to_json
from train_jax.config.renamed import RENAMED_TASKS
from train_jax.config.validate import unknown_key
from train_jax.core.errors import UserError

GOLDEN = Path(__file__).parent / "golden/workdir"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Copies the golden folder and makes the copy the current directory, since its paths are relative."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def same(result: dict, expected: dict) -> None:
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_an_old_run_evaluates(folder):
    eval_script.main(["eval.py", "--workdir=run"])
    same(json.loads((folder / "run/eval.json").read_text()), EXPECTED["eval"])


def former_dropout(x, rate, keys):
    """Draws the masks of the release that made the run: one key for each example, 32 random bits an entry."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, (x / (1.0 - rate)).astype(x.dtype), 0)


def test_an_old_run_resumes(folder, monkeypatch):
    monkeypatch.setattr(lora_layer, "example_dropout", former_dropout)
    monkeypatch.setattr(paligemma, "token_keys", lambda keys, positions: keys)
    stored = from_json((folder / "run/config.json").read_text())
    config = folder / "longer.py"
    config.write_text(
        "from pathlib import Path\nfrom train_jax.config.base import from_json\n\n\n"
        "def get_config():\n    return from_json(Path('run/config.json').read_text()).unlock()\n"
    )
    train.main(["train.py", f"--config={config}", "--workdir=run", "--config.total_steps=6", "--progress=none"])
    assert stored.total_steps == 4
    rows = [row for row in read_lines(folder / "run/metrics.jsonl") if row["step"] > 4]
    for result, expected in zip(rows, EXPECTED["continued_metrics"], strict=True):
        same(result, expected)
    same(json.loads((folder / "run/eval.json").read_text()), EXPECTED["continued_eval"])


def test_tasks_and_keys_of_old_configs_are_found():
    assert from_json((GOLDEN / "flow/config.json").read_text()).task == "flow_jax.tasks.plane:PlaneFlow"
    drawing = base_config("paligemma_jax.tasks.text_to_image:TextToImage")
    stored = json.loads(to_json(drawing))
    stored["told"] = stored.pop("conditioning")
    assert from_json(json.dumps(stored)) == drawing
    assert str(unknown_key("told", drawing)) == "config.told is now config.conditioning: write that"
    for old, new in RENAMED_TASKS.items():
        assert task_class(new).__name__ == new.partition(":")[2]
        with pytest.raises(UserError, match=f"config.task='{old}' has moved: write '{new}'"):
            task_class(old)
