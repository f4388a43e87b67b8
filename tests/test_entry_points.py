"""End-to-end tests of train.py, eval.py and predict.py on a small model: their files, and that they agree."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import eval as eval_script
import predict as predict_script
import train
from paligemma_jax.data.sources.clevr import ClevrQuestions
from paligemma_jax.data.train_tokenizer import build_model
from paligemma_jax.tasks.vqa import base_model
from tests.paligemma_jax.mini import (
    ROOT,
    SCENES,
    arguments,
    config_of,
    mistake,
    prepared_scenes,
    read_lines,
    train_main,
)
from train_jax import loop
from train_jax.checkpoints.manager import Checkpoints
from train_jax.config import command_line
from train_jax.config.validate import validate
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

RESULTS = {
    "examples",
    "loss",
    "accuracy",
    "accuracy_likelihood",
    "accuracy_blind",
    "accuracy_shuffled",
    "accuracy_most_frequent",
    "accuracy_question_only",
    "accuracy_by_family",
    "accuracy_before",
    "rouge1",
    "rouge2",
    "rouge3",
    "rougeL",
    "rougeS",
    "rougeW",
    "peak_memory_bytes",
    "seconds",
}
QUESTIONS = SCENES["data.num_validation_scenes"] * SCENES["data.questions_per_scene"]
COSTS = ("seconds", "peak_memory_bytes")


def results_of(workdir, name="eval.json"):
    return json.loads((workdir / name).read_text())


def without_costs(results):
    return {key: value for key, value in results.items() if key not in COSTS}


def evaluate(capsys, *more):
    command_line.run(eval_script.main, [str(ROOT / "eval.py"), *map(str, more)])
    return capsys.readouterr().out


def test_the_files_of_a_run(mini_run, mini_options):
    stored = json.loads((mini_run / "config.json").read_text())
    assert stored["batch_size"] == 8 and stored["data"]["num_train_scenes"] == 8
    lines = read_lines(mini_run / "metrics.jsonl")
    assert all("step" in line for line in lines)
    assert [line["step"] for line in lines if "learning_rate" in line] == [4, 8, 12]
    for name in ("scenes.png", "curves.png"):
        with Image.open(mini_run / name) as picture:
            assert min(picture.size) > 200
    assert any((mini_run / "tensorboard").iterdir())
    assert (mini_run / "tokenizer.model").is_file()
    companion = json.loads((mini_run / "question_only/config.json").read_text())
    assert companion["data"].pop("blank_images") and not stored["data"].pop("blank_images")
    assert companion["data"] == stored["data"] and companion["seed"] == stored["seed"]


def test_the_results_of_a_run(mini_run):
    results = results_of(mini_run)
    assert set(results) >= RESULTS
    assert results["examples"] == QUESTIONS and results["bad_rows"] == 0
    numbers = RESULTS - {"accuracy_by_family"}
    assert all(isinstance(results[name], int | float) and np.isfinite(results[name]) for name in numbers)
    controls = [results[f"accuracy_{name}"] for name in ("shuffled", "most_frequent", "question_only")]
    assert results["accuracy_blind"] == max(controls)
    assert results["accuracy_question_only"] == results_of(mini_run / "question_only")["accuracy"]
    families = results["examples_by_family"]
    assert sum(families.values()) == QUESTIONS
    weighted = sum(results["accuracy_by_family"][name] * count for name, count in families.items())
    np.testing.assert_allclose(weighted / QUESTIONS, results["accuracy"])


def test_the_predictions_of_a_run(mini_run, mini_options):
    rows = read_lines(mini_run / "predictions.jsonl")
    data = config_of(mini_options).data
    source = ClevrQuestions(prepared_scenes(mini_options), "validation", data.prompt)
    assert len(rows) == len(source) == QUESTIONS
    for row, index in zip(rows, range(QUESTIONS), strict=True):
        record = source[index]
        assert (row["image_name"], row["reference"]) == (record.image_name, record.suffix)
        assert data.prompt.replace("{question}", row["question"]) == record.prefix
        assert row["correct"] == (row["prediction"].strip() == row["reference"])
    assert np.mean([row["correct"] for row in rows]) == results_of(mini_run)["accuracy"]


def test_checkpoints_hold_adapters_alone(mini_run):
    checkpoints = Checkpoints(mini_run / "checkpoints", read_only=True)
    saved = checkpoints.restore_params(checkpoints.resolve("latest"))
    checkpoints.close()
    assert sorted(saved) == [
        f"decoder/layers/self_attn/{name}/lora_{half}" for name in ("o_proj", "q_proj") for half in "ab"
    ]
    assert any(np.abs(array).max() > 0 for path, array in saved.items() if path.endswith("lora_b"))


def test_the_same_command_again_reports_a_complete_run(mini_run, mini_options, capsys):
    before = (mini_run / "eval.json").read_bytes()
    train_main(mini_run, mini_options)
    assert f"{mini_run} is complete: 12 steps" in capsys.readouterr().out
    assert (mini_run / "eval.json").read_bytes() == before


def test_evaluating_again_gives_the_same_numbers(mini_run, mini_options, capsys):
    before, predictions = results_of(mini_run), (mini_run / "predictions.jsonl").read_bytes()
    evaluate(capsys, f"--workdir={mini_run}", "--config.eval.batch_size=5")
    again = results_of(mini_run)
    assert again.keys() == before.keys()
    assert (mini_run / "predictions.jsonl").read_bytes() == predictions or _close(mini_run, predictions)
    for name, value in without_costs(before).items():
        if isinstance(value, float):
            np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)
        elif name != "rouge":
            assert again[name] == value, name


def _close(workdir, before):
    """Whether predictions are equal up to the last digits of the losses."""
    rows, others = read_lines(workdir / "predictions.jsonl"), [json.loads(line) for line in before.splitlines()]
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(row.pop("nll"), other.pop("nll"), rtol=1e-4)
    return rows == others


def test_evaluating_another_split_and_checkpoint(mini_run, capsys):
    evaluate(capsys, f"--workdir={mini_run}", "--split=tune", "--checkpoint=6", "--config.eval.before=False")
    results = results_of(mini_run, "eval-tune.json")
    assert results["step"] == 6 and "accuracy_before" not in results
    assert results["accuracy_question_only"] is not None
    assert results["examples"] == len(read_lines(mini_run / "predictions-tune.jsonl")) == 2 * 5
    assert (mini_run / "scenes-tune.png").is_file()
    validated = {line["step"]: line for line in read_lines(mini_run / "metrics.jsonl") if "accuracy" in str(line)}
    loss = next(value for key, value in validated[6].items() if key.endswith("loss") and key != "loss")
    np.testing.assert_allclose(results["loss"], loss, rtol=1e-5)


def test_evaluating_a_base_model_without_a_run(mini_options, mini_run, tmp_path, capsys):
    options = [f"--config.{key}={value}" for key, value in mini_options.items()]
    evaluate(capsys, f"--config={ROOT / 'configs/clevr.py'}", f"--workdir={tmp_path / 'base'}", *options)
    base, trained = results_of(tmp_path / "base"), results_of(mini_run)
    assert base["step"] == 0 and base["examples"] == QUESTIONS
    assert base["accuracy_likelihood"] == base["accuracy_before"] == trained["accuracy_before"]
    assert base["accuracy_question_only"] is None
    assert base["accuracy_blind"] == max(base["accuracy_shuffled"], base["accuracy_most_frequent"])
    assert base["loss"] > trained["loss"]
    assert 0 < base["accuracy_before"] < trained["accuracy_likelihood"]


def test_print_batch(mini_options, tmp_path, capsys):
    train_main(tmp_path / "run", mini_options, "--print_batch")
    out = capsys.readouterr().out
    blocks = out.strip().split("\n\nexample ")
    assert len(blocks) >= 8
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith(("tokens", "mask_"))}
    assert set(lines) == {"tokens", "mask_ar", "mask_input", "mask_loss"}
    rows = out.split("example 1\n")[1].splitlines()[:4]
    assert [row.split()[0] for row in rows] == ["tokens", "mask_ar", "mask_input", "mask_loss"]
    assert len({len(row) for row in rows}) == 1  # aligned
    assert "<bos>" in out and "<eos>" in out and "\\n" in out
    assert not (tmp_path / "run").exists()


# predict.py


def ask(capsys, *more):
    command_line.run(predict_script.main, [str(ROOT / "predict.py"), *map(str, more)])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *more):
    with pytest.raises(SystemExit) as stopped:
        ask(capsys, *more)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def pictures(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 40, 3), np.uint8)).save(file)
    return files


def test_predict(mini_run, mini_folder, pictures, capsys):
    images = [f"--image={file}" for file in pictures]
    question = "How many red cubes are there?"
    lines = ask(capsys, f"--workdir={mini_run}", *images, f"--prompt={question}", "--max_new_tokens=4")
    assert [line.partition("  ->  ")[0] for line in lines] == [f"{file}  {question}" for file in pictures]
    # A base model receives the prompt unchanged; with the template written out and untrained adapters it is the same.
    base = [f"--model={mini_folder}", images[0], "--max_new_tokens=4"]
    both = ask(capsys, *base, "--prompt=caption en", f"--prompt=answer en {question}")
    alone = ask(capsys, *base, f"--prompt=answer en {question}")
    assert both[0].startswith(f"{pictures[0]}  caption en  ->  ") and both[1:] == alone


def test_predict_with_another_prompt_template(mini_run, pictures, capsys):
    question = "How many red cubes are there?"
    more = (f"--workdir={mini_run}", f"--image={pictures[0]}", "--max_new_tokens=4")
    usual = ask(capsys, *more, f"--prompt={question}")[0].rpartition("  ->  ")[2]
    bare = ask(capsys, *more, f"--prompt=answer en {question}", "--config.data.prompt={question}")
    assert bare[0].rpartition("  ->  ")[2] == usual
    drawn = [
        ask(capsys, *more, f"--prompt={question}", "--sampler=temperature", f"--temperature={t}") for t in (0, 100)
    ]
    assert drawn[0][0].endswith(f"  ->  {usual}") and drawn[0] != drawn[1]
    assert "dtype=bfloat16 is given with a run" in refused(capsys, *more, "--prompt=x", "--dtype=bfloat16")
    assert "give either --workdir=DIR (a run) or --model" in refused(capsys, *more, "--prompt=x", "--model=tiny")


def test_predict_prints_one_line_for_each_answer(capsys, monkeypatch):
    answers = [("a.png", "p", "two\nlines\r"), ("b.png", "q\nr", "one")]
    monkeypatch.setattr("paligemma_jax.inference.answer.predict", lambda *args, **options: answers)
    lines = ask(capsys, "--model=tiny", "--image=a.png", "--prompt=p")
    assert lines == ["a.png  p  ->  two\\nlines\\r", "b.png  q\\nr  ->  one"]


def test_predict_samples_differ_across_batches_of_prompts(mini_folder, pictures, capsys):
    prompts = ["--prompt=caption en"] * 18
    sampler = ("--sampler=temperature", "--temperature=2.0", "--max_new_tokens=4")
    lines = ask(capsys, f"--model={mini_folder}", f"--image={pictures[0]}", *prompts, *sampler)
    assert len(lines) == 18 and lines[16:] != lines[:2]


def test_predict_with_a_tokenizer_from_elsewhere(mini_folder, pictures, tmp_path, capsys):
    shutil.copytree(mini_folder, tmp_path / "model")
    (tmp_path / "model/tokenizer.model").rename(tmp_path / "words.model")
    more = (f"--image={pictures[0]}", "--prompt=caption en", "--max_new_tokens=3")
    assert "No tokenizer at" in refused(capsys, f"--model={tmp_path / 'model'}", *more)
    result = ask(capsys, f"--model={tmp_path / 'model'}", f"--tokenizer={tmp_path / 'words.model'}", *more)
    assert result == ask(capsys, f"--model={mini_folder}", *more)
    (tmp_path / "large.model").write_bytes(build_model([f"word{i}" for i in range(400)]))
    tokenizer = f"--tokenizer={tmp_path / 'large.model'}"
    assert "the tokenizer needs" in refused(capsys, f"--model={tmp_path / 'model'}", tokenizer, *more)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ([], "give either --workdir=DIR (a run) or --model=PATH"),
        (["--model=tiny"], "found 0 image(s) and 0 prompt(s)"),
        (["--model=tiny", "--image=a", "--image=b", *["--prompt=x"] * 3], "found 2 image(s) and 3 prompt(s)"),
        (["--workdir=/nowhere", "--image=a", "--prompt=x"], "/nowhere holds no run with checkpoints"),
        (["--model=tiny", "--imge=a"], "unknown argument '--imge=a'; did you mean 'image'?"),
        (["--model=tiny", "--config.compute_dtype=bfloat16"], "there is no key config.compute_dtype"),
        (["--workdir=x", "--model=tiny", "--prompt=x"], "give either --workdir=DIR (a run) or --model=PATH"),
        (["--model=tiny", "--image=a", "--prompt=x", "--out=y.png"], "--out=y.png is given, but only runs of"),
        (["--model=tiny", "--image=a", "--prompt=x", "--class=cat"], "found 'x' beside --class, expected no prompt"),
        (["--model=tiny", "--image=a", "--prompt=x", "--top_k=3"], "sampler 'greedy' takes draft_tokens, not top_k"),
    ],
)
def test_errors_of_predict(capsys, more, sentence):
    assert sentence in refused(capsys, *more)


def test_predict_names_the_image_it_cannot_read(mini_folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, reason in (("broken.png", "cannot decode the image"), ("absent.png", "No such file")):
        sentence = refused(capsys, f"--model={mini_folder}", f"--image={tmp_path / name}", "--prompt=x")
        assert str(tmp_path / name) in sentence and reason in sentence


# Errors: one sentence, status 2, before anything is compiled.


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"eval.batchsize": 3}, "there is no key config.eval.batchsize; did you mean 'eval.batch_size'?"),
        ({"adapter.rank": "high"}, "config.adapter.rank='high', expected int: change the value"),
        ({"model.path": "nowhere"}, "No tokenizer at nowhere"),
        ({"mesh.data": 8, "batch_size": 12}, "config.batch_size=12 does not divide over the mesh's data=8 x fsdp=1"),
        ({"adapter.targets": "decoder/.*/qproj"}, "lora targets: 'decoder/.*/qproj' matches none of 15 paths"),
        ({"adapter.targets": ".*/q_proj"}, "cache_features is on but vision/layers/self_attn/q_proj/lora_a trains"),
        ({"adapter.name": "none", "trainable": "nothing", "cache_features": False}, "trainable parameters: 'nothing'"),
        ({"trainable": "decoder/.*"}, "trainable is 'decoder/.*' beside adapter.name='lora'"),
        ({"adapter.name": "qlora"}, "config.adapter.name='qlora', expected one of lora, bottleneck, prefix"),
        ({"adapter.rank": 0}, "config.adapter.rank=0, expected 1 or more"),
        ({"adapter.dropout": 1.0}, "config.adapter.dropout=1.0, expected 0 or more and below 1"),
        ({"model.remat": "all"}, "config.model.remat='all', expected one of none, block, dots"),
        ({"model.path": "random:5b", "tokenizer": "tiny"}, "random:5b: variant '5b' is unknown, expected"),
        ({"loss.reduction": "mean"}, "config.loss.reduction='mean', expected one of token_mean, example_mean"),
        ({"loss.chunk_size": 0}, "config.loss.chunk_size=0, expected 1 or more"),
        ({"loss.vocab_chunk": -5}, "config.loss.vocab_chunk=-5, expected 1 or more"),
        ({"eval.max_new_tokens": 0}, "config.eval.max_new_tokens=0, expected 1 or more"),
        ({"data.on_truncation": "cut"}, "config.data.on_truncation='cut', expected one of raise, skip"),
        ({"cache_features_mb": 0}, "cache_features needs 1 MiB of host memory for 6 images, expected at most"),
        ({"best_metric": "acuracy"}, "best_metric"),
        ({"data.name": "coco"}, "data.name is 'coco', expected one of synthetic_clevr, clevr, parquet, jsonl"),
        ({"data.name": "clevr"}, "data.name is 'clevr' but data.source is not set"),
        ({"data.name": "jsonl", "data.source": "/nowhere"}, "/nowhere holds no JSONL file, expected train.jsonl"),
        ({"data.tune_fraction": 1.0}, "config.data.tune_fraction=1.0, expected a number above 0 and below 1"),
        ({"data.prompt": "answer en"}, "the prompt 'answer en' has no place for the question"),
        ({"data.validation_split": "val"}, "no split 'val'"),
    ],
)  # fmt: skip
def test_errors_of_train(mini_options, tmp_path, capsys, monkeypatch, changes, sentence):
    monkeypatch.setattr(loop.Trainer, "train", lambda *args: pytest.fail("the run went on"))
    assert sentence in mistake(capsys, mini_options | changes, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_a_tokenizer_too_large_for_the_model(mini_options, tmp_path, capsys, monkeypatch):
    words = [f"word{i}" for i in range(400)]
    (tmp_path / "tokenizer.model").write_bytes(build_model(words))
    monkeypatch.setattr(loop.Trainer, "train", lambda *args: pytest.fail("the run went on"))
    changes = {"tokenizer": str(tmp_path), "data.cache_dir": str(tmp_path / "nothing is rendered")}
    sentence = mistake(capsys, mini_options | changes, tmp_path / "run")
    assert "The model's vocabulary has 1,792 entries but the tokenizer needs" in sentence
    assert not (tmp_path / "nothing is rendered").exists()


@pytest.mark.parametrize("arg", ["fp16", "fp16,smoke", "3b,smoke"])
def test_contradicting_arguments_of_the_config(arg):
    with pytest.raises(UserError, match="needs 3b|exclude each other"):
        command_line.load_config(f"{ROOT / 'configs/clevr.py'}:{arg}")


def test_the_config_of_the_report():
    for arg, dtype in (("3b", "bfloat16"), ("3b,fp16", "float16")):
        config = command_line.load_config(f"{ROOT / 'configs/clevr.py'}:{arg}")
        assert config.compute_dtype == dtype and not config.eval.question_only
        config.mesh.data = 1
        validate(config)


def test_own_data(mini_options, tmp_path, capsys, monkeypatch):
    """The sample of ten rows trains; eval.json has every result that is defined for it."""
    options = {key: value for key, value in mini_options.items() if key.split(".")[0] in ("model", "mesh")}
    options |= {"data.source": str(ROOT / "docs/sample_data"), "total_steps": 4, "batch_size": 4, "data.threads": 0}
    options |= {"eval.max_new_tokens": 4}
    config = str(ROOT / "configs/own_data.py")
    reads, load = [], base_model.load
    monkeypatch.setattr(base_model, "load", lambda *args, **more: reads.append(args) or load(*args, **more))
    train.main(arguments(tmp_path / "run", options, "--progress=none", config=config))
    assert len(reads) == 1  # the control run shares the frozen weights
    results = results_of(tmp_path / "run")
    assert results["examples"] == 3
    assert results["accuracy_shuffled"] is None  # one image
    assert results["accuracy_likelihood"] is None and results["accuracy_before"] is None  # no candidates
    rows = read_lines(ROOT / "docs/sample_data/validation.jsonl")
    result = read_lines(tmp_path / "run/predictions.jsonl")
    assert [row["reference"] for row in result] == [row["suffix"] for row in rows]
    # Its rows have whole prompts, so `predict` uses no template.
    file = f"--image={ROOT / 'docs/sample_data' / rows[0]['image']}"
    capsys.readouterr()
    lines = ask(capsys, f"--workdir={tmp_path / 'run'}", file, f"--prompt={rows[0]['prefix']}", "--max_new_tokens=4")
    assert lines == [f"{file.removeprefix('--image=')}  {rows[0]['prefix']}  ->  {_escaped(result[0]['prediction'])}"]


def _escaped(text):
    return text.replace("\n", "\\n").replace("\r", "\\r")


def test_own_data_without_a_validation_split(mini_folder, mini_options, tmp_path, capsys):
    images = ROOT / "docs/sample_data/images"
    shutil.copytree(images, tmp_path / "data/images")
    shutil.copy(ROOT / "docs/sample_data/train.jsonl", tmp_path / "data")
    options = {"data.source": str(tmp_path / "data"), "model.path": str(mini_folder), "mesh.data": 1}
    sentence = mistake(capsys, options, tmp_path / "run", config=str(ROOT / "configs/own_data.py"))
    assert "holds train.jsonl, expected validation.jsonl" in sentence
