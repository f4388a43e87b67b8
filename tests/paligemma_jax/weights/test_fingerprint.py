"""The digest of a base: what changes it, what does not, and runs on another base."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import paligemma_jax as pg
from paligemma_jax.tasks.contrastive.task import Contrastive
from paligemma_jax.tasks.coprompt.task import CoPrompt
from paligemma_jax.tasks.text_to_image.task import TextToImage
from paligemma_jax.tasks.vqa.task import VQA
from paligemma_jax.weights import fingerprint
from paligemma_jax.weights.fingerprint import base_digest, check_digest, write_digest
from tests.paligemma_jax.mini import config_of
from train_jax import loop
from train_jax.core.errors import UserError


def test_the_digest_depends_only_on_the_weights(mini_folder, tmp_path, golden):
    shutil.copytree(mini_folder, tmp_path / "copy")
    (tmp_path / "copy/config.json").write_text((mini_folder / "config.json").read_text() + " ")
    assert base_digest(tmp_path / "copy") == base_digest(str(mini_folder))
    paths = [mini_folder, "tiny", golden / "hf_paligemma", golden / "bigvision_paligemma/params.npz", "random:tiny"]
    assert len({base_digest(path) for path in [*paths, "random:3b-224"]}) == 6
    file = tmp_path / "copy/model.safetensors"
    weights = dict(load_file(file))
    name = sorted(weights)[3]
    weights[name] = weights[name] * np.float32(1.001)
    save_file(weights, file)
    assert base_digest(tmp_path / "copy") != base_digest(mini_folder)


def test_large_files_are_digested_in_pieces(tmp_path, monkeypatch):
    """With 4 pieces of 8 bytes, those at 0, 24, 48 and 72, and the size, are digested."""
    monkeypatch.setattr(fingerprint, "WHOLE", 32)
    monkeypatch.setattr(fingerprint, "PIECE", 8)
    file = tmp_path / "x.npz"

    def of(content: bytes) -> str:
        file.write_bytes(content)
        return base_digest(file)

    plain = bytes(80)
    changed = {at for at in range(80) if of(plain[:at] + b"x" + plain[at + 1 :]) != of(plain)}
    assert changed == {start + i for start in (0, 24, 48, 72) for i in range(8)}
    assert of(bytes(81)) != of(plain)
    assert len({of(bytes([i]) + bytes(20)) for i in range(5)}) == 5  # 21 bytes are read whole
    assert all(of(bytes(at) + b"x" + bytes(20 - at)) != of(bytes(21)) for at in range(21))


def test_no_base(tmp_path):
    with pytest.raises(UserError, match="no model at .*nowhere"):
        base_digest(tmp_path / "nowhere")


def test_a_workdir_stores_the_digest_of_its_base(mini_folder, golden, tmp_path):
    check_digest(tmp_path, "nowhere")  # nothing stored, nothing to compare
    write_digest(tmp_path, mini_folder)
    check_digest(tmp_path, mini_folder)
    with pytest.raises(UserError, match="was trained on the base that was at .*, found another at .*hf_paligemma "):
        check_digest(tmp_path, golden / "hf_paligemma")


@pytest.fixture
def on_another_base(mini_run, mini_folder, mini_options, tmp_path):
    """The finished run without its evaluation and with replaced files of its base; and its options."""
    shutil.copytree(mini_folder, tmp_path / "base")
    options = mini_options | {"model.path": str(tmp_path / "base"), "cache_features": False}
    run = tmp_path / "run"
    shutil.copytree(mini_run / "checkpoints", run / "checkpoints")
    config = json.loads((mini_run / "config.json").read_text())
    config["model"]["path"], config["cache_features"] = options["model.path"], False
    (run / "config.json").write_text(json.dumps(config))
    shutil.copy(mini_run / "base.json", run / "base.json")
    weights = dict(load_file(tmp_path / "base/model.safetensors"))
    weights["multi_modal_projector.linear.bias"] = weights["multi_modal_projector.linear.bias"] + 1
    save_file(weights, tmp_path / "base/model.safetensors")
    return run, options


@pytest.mark.usefixtures("fast_compilation")
def test_adapters_are_refused_on_another_base(on_another_base, mini_folder, monkeypatch):
    run, options = on_another_base
    monkeypatch.setattr(loop.Trainer, "train", lambda *args: pytest.fail("the run went on"))
    monkeypatch.setattr(VQA, "base", lambda task: pytest.fail("the model was read"))
    monkeypatch.setattr(VQA, "split", lambda task, name: pytest.fail("data were prepared"))
    calls = (
        lambda: pg.load(run),
        lambda: loop.evaluate(config_of(options), run),
        lambda: loop.fit(config_of(options | {"total_steps": 20}), run, "none"),
    )
    for process in (0, 1):  # every process reports it
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        for call in calls:
            with pytest.raises(UserError, match="was trained on the base that was at .*, found another at"):
                call()
    monkeypatch.undo()
    shutil.copy(mini_folder / "model.safetensors", options["model.path"])
    pg.load(run)


@pytest.mark.parametrize(
    ("kind", "settings", "recorded", "sentence"),
    [
        (Contrastive, {"model": {"path": "SECOND"}, "init": {"vision": None}}, {"path": "FIRST"}, "set model.path to"),
        (
            Contrastive,
            {"model": {"path": None}, "init": {"vision": "SECOND"}},
            {"path": None, "vision": "FIRST"},
            "init.vision to",
        ),
        (CoPrompt, {"model": {"path": "SECOND"}}, {"path": "FIRST"}, "set model.path to"),
        (
            TextToImage,
            {"conditioning": "captions", "siglip": "SECOND"},
            {"path": None, "siglip": "FIRST"},
            "on the texts of .* set siglip to",
        ),
    ],
)
def test_every_task_that_starts_from_weights_checks_the_workdir(
    mini_folder, golden, tmp_path, kind, settings, recorded, sentence
):
    """The runtime checks it as soon as the task is made (train_jax/task.py)."""
    places = {"FIRST": str(mini_folder), "SECOND": str(golden / "hf_paligemma"), None: None}
    write_digest(tmp_path, **{key: places[value] for key, value in recorded.items()})
    task = object.__new__(kind)
    task.config = ConfigDict(json.loads(json.dumps(settings).replace("SECOND", places["SECOND"])))
    with pytest.raises(UserError, match=sentence):
        task.check_workdir(tmp_path)
    task.config = ConfigDict(json.loads(json.dumps(settings).replace("SECOND", places["FIRST"])))
    task.check_workdir(tmp_path)
