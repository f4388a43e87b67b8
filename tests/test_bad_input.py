"""Messages for bad files and interrupted runs: one sentence and an exit status, no traceback."""

import json
import os
import shutil
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import eval as eval_script
import predict as predict_script
import train
from paligemma_jax.tasks.vqa import figures as vqa_figures
from tests.paligemma_jax.mini import ROOT, arguments, mistake, png, read_lines, train_main, write_rows
from train_jax import loop
from train_jax.config import command_line
from train_jax.data.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("fast_compilation")
OWN_DATA = str(ROOT / "configs/own_data.py")
UP, DOWN = (f"language_model.model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down"))
QUICK = {"eval.controls": False, "eval.before": False, "eval.candidates": "", "cache_features": False}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Skips TensorBoard and curves, which take longer than the runs."""
    monkeypatch.setattr(loop, "plot_curves", lambda *paths: None)
    monkeypatch.setattr(vqa_figures, "save_answer_sheet", lambda *args, **options: None)


@pytest.fixture
def nothing_trains(monkeypatch):
    monkeypatch.setattr(loop.Trainer, "train", lambda *args: pytest.fail("the run went on"))


def ends(capsys, main, argv) -> tuple[int, list[str], str]:
    """Returns the exit status, the script's own lines on stderr, and stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command_line.run(main, argv)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    name = argv[0].rpartition("/")[2]
    return stopped.value.code, [line for line in captured.err.splitlines() if line.startswith(name)], captured.out


# Weights.


@pytest.fixture
def model_folder(mini_folder, tmp_path):
    """A copy of the model for a test to damage."""
    return shutil.copytree(mini_folder, tmp_path / "model")


@pytest.mark.usefixtures("nothing_trains")
def test_every_weight_is_accounted_for_both_ways(mini_options, model_folder, tmp_path, capsys):
    file = model_folder / "model.safetensors"
    arrays = load_file(file)
    arrays["stray.weight"] = arrays.pop(UP)
    del arrays[DOWN]
    save_file(arrays, file)
    sentence = mistake(capsys, mini_options | {"model.path": str(model_folder)}, tmp_path / "run")
    assert f"{model_folder} does not match the model: missing " in sentence
    missing, unused = sentence.partition("missing ")[2].split("; not used ")
    assert UP in missing and DOWN in missing and missing.count(".weight") == 2
    assert unused == "stray.weight. Check that the file belongs to this architecture."
    words = [f"--model={model_folder}", "--image=x.png", "--prompt=x"]
    assert ends(capsys, predict_script.main, ["predict.py", *words])[:2] == (2, [f"predict.py: error: {sentence}"])


class Harmful:
    """An object that creates a file when unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.usefixtures("nothing_trains")
def test_a_pickle_among_the_weights_is_never_opened(mini_options, mini_folder, tmp_path, capsys):
    harm = tmp_path / "harm"
    with np.load(ROOT / "tests/golden/bigvision_paligemma/params.npz") as stored:
        arrays = dict(stored)
    name = next(name for name in arrays if name.endswith("input_embedding"))
    bad = np.empty(arrays[name].shape, object)
    bad[...] = 0
    bad[0, 0] = Harmful(str(harm))
    np.savez(tmp_path / "bad.npz", **arrays | {name: bad})
    options = mini_options | {"model.path": str(tmp_path / "bad.npz"), "tokenizer": str(mini_folder)}
    sentence = mistake(capsys, options, tmp_path / "run")
    assert str(tmp_path / "bad.npz") in sentence and "input_embedding" in sentence
    assert sentence.endswith(": download it again.")
    assert not harm.exists()


@pytest.mark.usefixtures("nothing_trains")
@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_a_shard_outside_its_folder(mini_options, model_folder, tmp_path, capsys, shard):
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {UP: shard, DOWN: "model.safetensors"}}))
    sentence = mistake(capsys, mini_options | {"model.path": str(model_folder)}, tmp_path / "run")
    assert sentence == f"{index} points to {shard!r}, outside its folder: shards must lie beside it."


# A user's rows.


@pytest.fixture
def own_rows(tmp_path):
    """Twenty training rows and four validation rows, each with its own image."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, numbers in (("train", range(20)), ("validation", range(20, 24))):
        for i in numbers:
            (folder / f"{i}.png").write_bytes(png(i))
        rows = [{"image": f"{i}.png", "prefix": "answer en What is this?", "suffix": "red"} for i in numbers]
        write_rows(folder, split, rows)
    return folder


@pytest.fixture
def own_options(mini_options, own_rows):
    kept = {key: value for key, value in mini_options.items() if key.split(".")[0] in ("model", "mesh")}
    sizes = {"total_steps": 4, "batch_size": 10, "log_steps": 1, "eval_steps": 4, "checkpoint_steps": 4}
    data = {
        "data.source": str(own_rows),
        "data.cache_dir": str(own_rows / "cache"),
        "data.threads": 0,
        "data.prefix_length": 24,
        "data.suffix_length": 4,
    }
    return kept | QUICK | sizes | data | {"eval.max_new_tokens": 2, "data.tune_fraction": 0.05}


@pytest.mark.usefixtures("nothing_trains")
def test_an_image_path_that_leaves_the_folder(own_options, own_rows, tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(png(0))
    rows = read_lines(own_rows / "train.jsonl")
    rows[2]["image"] = "../secret.png"
    write_rows(own_rows, "train", rows)
    assert mistake(capsys, own_options, tmp_path / "run", config=OWN_DATA) == (
        f"{own_rows / 'train.jsonl'} line 3: the image path '../secret.png' leaves the folder of the file, expected a "
        "path within it; move the image there."
    )


def test_a_suffix_that_is_too_long_stops_the_run(own_options, own_rows, tmp_path, capsys):
    rows = read_lines(own_rows / "train.jsonl")
    for row in rows:
        row["suffix"] = "red red red red red"
    write_rows(own_rows, "train", rows)
    sentence = mistake(capsys, own_options, tmp_path / "run", config=OWN_DATA)
    assert sentence.startswith("The suffix with EOS has ") and "tokens but 4 fit" in sentence
    assert sentence.endswith("'red red red red red'); raise the length or shorten the text.")


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_image_is_named_and_counted_and_the_run_goes_on(
    own_options, own_rows, tmp_path, capsys, caplog, cached
):
    (own_rows / "7.png").write_bytes(png(7)[:60])
    options = own_options | {"data.max_bad_fraction": 0.2, "cache_features": cached}
    train_main(tmp_path / "run", options, config=OWN_DATA)
    assert any("7.png" in record.getMessage() and record.levelname == "WARNING" for record in caplog.records)
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "good_rows" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {round(line["good_rows"], 6) for line in lines} == {0.9, 1.0} and lines[-1]["bad_rows"] == 1
    results = json.loads((tmp_path / "run/eval.json").read_text())
    assert results["finished"] and results["bad_rows"] == 0 and results["examples"] == 4


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_complete_run_whose_images_changed(own_options, own_rows, tmp_path, capsys, split):
    """With the same names and other bytes, the run is not reported as complete and nothing is written."""
    train_main(tmp_path / "run", own_options, config=OWN_DATA)
    train_main(tmp_path / "run", own_options, config=OWN_DATA)
    assert f"{tmp_path / 'run'} is complete: 4 steps trained" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}
    name = read_lines(own_rows / f"{split}.jsonl")[0]["image"]
    (own_rows / name).write_bytes(png(1234))
    sentence = mistake(capsys, own_options, tmp_path / "run", config=OWN_DATA)
    assert ("the training data is not that of the checkpoint" if split == "train" else "have changed") in sentence
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("cached", [False, True])
def test_too_many_broken_images_stop_the_run(own_options, own_rows, tmp_path, capsys, cached):
    for i in range(8):
        (own_rows / f"{i}.png").write_bytes(b"")
    options = own_options | {"data.max_bad_fraction": 0.2, "cache_features": cached}
    sentence = mistake(capsys, options, tmp_path / "run", config=OWN_DATA)
    assert " rows read were bad (" in sentence and ".png" in sentence
    assert sentence.endswith("expected at most 20.0%; correct the data or raise data.max_bad_fraction.")
    assert not (tmp_path / "run/eval.json").exists()


# Interruptions.


@pytest.mark.filterwarnings("ignore:coroutine")  # one that the full disk interrupts
def test_a_full_disk(own_options, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "async_save", full)
        sentence = mistake(capsys, own_options, tmp_path / "run", "--progress=none", config=OWN_DATA)
    checkpoints = tmp_path / "run/checkpoints"
    assert sentence.startswith(f"no space for checkpoint 4 in {checkpoints}: it takes about ")
    assert sentence.endswith("free space on that disk and run the same command to resume")
    train_main(tmp_path / "run", own_options, config=OWN_DATA)
    assert json.loads((tmp_path / "run/eval.json").read_text())["step"] == 4


def test_ctrl_c_in_a_step_saves_and_the_same_command_resumes(own_options, tmp_path, capsys, monkeypatch):
    read = Pipeline.read

    def interrupted(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, step)

    argv = arguments(tmp_path / "run", own_options, "--progress=none", config=OWN_DATA)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "read", interrupted)
        status, lines, out = ends(capsys, train.main, argv)
    assert (status, lines) == (130, [])
    assert out.splitlines()[-1] == "interrupted: saved at step 3; run the same command to resume."
    command_line.run(train.main, argv)
    assert "4 steps, resuming at step 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/eval.json").read_text())["step"] == 4


def test_ctrl_c_before_the_first_step(own_options, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "make_task", interrupted)
    argv = arguments(tmp_path / "run", own_options, config=OWN_DATA)
    status, lines, _ = ends(capsys, train.main, argv)
    assert status == 130
    assert lines == ["train.py: interrupted; the same command resumes from the latest checkpoint."]


# eval.py and predict.py.


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--checkpoint=7"], "checkpoint '7' not found in "),
        (["--split=tset"], "has no split 'tset', expected one of ['train', 'validation']"),
        (["--config.adapter.rank=4"], "the run was made with another model (adapter.rank: 8 -> 4)"),
        (["--config.eval.batchsize=4"], "there is no key config.eval.batchsize; did you mean 'eval.batch_size'?"),
        (["--chekpoint=best"], "unknown argument '--chekpoint=best'; did you mean 'checkpoint'?"),
    ],
)
def test_errors_of_eval(mini_run, capsys, more, sentence):
    before = (mini_run / "eval.json").read_bytes()
    status, lines, _ = ends(capsys, eval_script.main, ["eval.py", f"--workdir={mini_run}", *more])
    assert status == 2 and len(lines) == 1 and lines[0].startswith("eval.py: error: ") and sentence in lines[0]
    assert (mini_run / "eval.json").read_bytes() == before


def test_eval_of_a_folder_without_a_run(tmp_path, capsys):
    status, lines, _ = ends(capsys, eval_script.main, ["eval.py", f"--workdir={tmp_path}"])
    assert (status, lines) == (
        2,
        [
            f"eval.py: error: {tmp_path / 'config.json'} does not exist, expected a workdir of a run: correct "
            "--workdir, or give --config"
        ],
    )


def test_predict_with_a_missing_checkpoint(mini_run, capsys):
    words = [f"--workdir={mini_run}", "--checkpoint=7", "--image=x.png", "--prompt=x"]
    status, lines, _ = ends(capsys, predict_script.main, ["predict.py", *words])
    assert status == 2 and len(lines) == 1 and lines[0].startswith("predict.py: error: checkpoint '7' not found in ")
