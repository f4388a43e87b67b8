"""The command that converts checkpoints: every direction, runs, dtypes, and errors."""

import numpy as np
import pytest
from flax import nnx

from paligemma_jax import convert, loading
from paligemma_jax.adapt.lora.adapter import attach_lora, merge_lora
from paligemma_jax.adapt.quantization.quantize import dequantize
from paligemma_jax.data.tokenizers.paligemma import load_tokenizer
from paligemma_jax.files import hub
from paligemma_jax.weights import save_big_vision, save_hugging_face, save_orbax
from paligemma_jax.weights.reader import load, stored_dtype
from train_jax.config import command_line
from train_jax.core import param_tree

pytestmark = pytest.mark.usefixtures("fast_compilation")

PLACES = {"hugging_face": "hf", "big_vision": "model.npz", "orbax": "orbax"}
SAVE = {"hugging_face": save_hugging_face, "big_vision": save_big_vision, "orbax": save_orbax}


@pytest.fixture(scope="module")
def sources(hugging_face_model, tmp_path_factory):
    """The same model in each format, with a tokenizer beside it."""
    root = tmp_path_factory.mktemp("sources")
    for name, place in PLACES.items():
        SAVE[name](hugging_face_model, root / name / place)
        folder = root / name if name == "big_vision" else root / name / place
        (folder / "tokenizer.model").write_bytes(load_tokenizer("tiny").model_bytes)
    return {name: root / name / place for name, place in PLACES.items()}


def assert_same_arrays(model, expected):
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path, strict=True)


def run(*arguments):
    convert.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("source", PLACES)
def test_every_direction_keeps_the_model_and_its_tokenizer(
    sources, tmp_path, capsys, hugging_face_model, source, target
):
    place = tmp_path / PLACES[target]
    run(sources[source], place, f"--format={target}")
    assert capsys.readouterr().out == f"wrote {place}\n"
    assert_same_arrays(load(place), hugging_face_model)
    assert load_tokenizer(place).model_bytes == load_tokenizer("tiny").model_bytes


def test_the_dtype_is_the_sources_unless_given(sources, tmp_path, golden):
    save_hugging_face(load(golden / "hf_paligemma", "bfloat16"), tmp_path / "bf16")
    run(tmp_path / "bf16", tmp_path / "a.npz", "--format=big_vision")
    assert stored_dtype(tmp_path / "a.npz") == "bfloat16"
    run(tmp_path / "a.npz", tmp_path / "b", "--format=orbax", "--dtype=float32")
    assert stored_dtype(tmp_path / "b") == "float32"
    run(tmp_path / "b", tmp_path / "c", "--format=hugging_face", "--dtype=float16")
    assert stored_dtype(tmp_path / "c") == "float16"


def test_quantised_kernels_are_made_kept_and_dequantised(sources, tmp_path, capsys):
    run(sources["hugging_face"], tmp_path / "a", "--format=orbax", "--quantize=nf4")
    run(tmp_path / "a", tmp_path / "b", "--format=orbax")
    expected = load(sources["hugging_face"], quantize="nf4")
    assert_same_arrays(load(tmp_path / "b"), expected)
    capsys.readouterr()
    run(tmp_path / "b", tmp_path / "c", "--format=hugging_face")
    assert "dequantised: 14 kernels in nf4" in capsys.readouterr().out
    assert_same_arrays(load(tmp_path / "c"), dequantize(expected))


def test_adapters_of_a_run_are_merged(monkeypatch, tmp_path, golden, make_random):
    adapted = attach_lora(load(golden / "hf_paligemma"), rngs=nnx.Rngs(0))
    for path, array in param_tree.flatten(adapted).items():
        if path.endswith("lora_b"):
            adapted = param_tree.assign(adapted, {path: array + 0.1})
    merged = merge_lora(nnx.clone(adapted))
    monkeypatch.setattr(loading, "is_run", lambda path: True)
    monkeypatch.setattr(loading, "load", lambda path, dtype: adapted)
    place = convert.convert(str(tmp_path), str(tmp_path / "out"), "hugging_face")
    assert_same_arrays(load(place), merged)


def test_push_uploads_what_was_written(sources, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(hub, "push", lambda place, name: pushed.append((place, name)) or "https://hub/me/model")
    run(sources["orbax"], tmp_path / "hf", "--format=hugging_face", "--push=me/model")
    assert pushed == [(tmp_path / "hf", "me/model")]
    assert capsys.readouterr().out.endswith("pushed to https://hub/me/model\n")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{source}"], "expected SRC DST --format=hugging_face|big_vision|orbax"),
        (["{source}", "{new}"], "expected SRC DST --format="),
        (["{source}", "{new}", "--format=gguf"], "--format is 'gguf', expected one of hugging_face, big_vision, orbax"),
        (["{source}", "{new}", "--format=big_vision"], "does not end in .npz"),
        (["{source}", "{source}", "--format=orbax"], "exists already"),
        (["{new}", "{new}", "--format=orbax"], "no model at"),
        (["{npz}:img", "{new}", "--format=orbax"], "is one tower, expected a whole model"),
        (["{source}", "{new}", "--format=orbax", "--dtype=int8"], "dtype is 'int8'"),
        (["{source}", "{new}", "--fromat=orbax"], "fromat"),
        (["{source}", "{new}", "--format=hugging_face", "--quantize=int8"], "expected orbax, which stores it"),
        (["{source}", "{new}", "--format=orbax", "--quantize=int3"], "quantize is 'int3', expected one of nf4"),
    ],
)
def test_errors_are_one_sentence_and_write_nothing(sources, tmp_path, capsys, arguments, sentence):
    new = tmp_path / "new"
    filled = [
        argument.format(source=sources["hugging_face"], npz=sources["big_vision"], new=new) for argument in arguments
    ]
    with pytest.raises(SystemExit) as stopped:
        command_line.run(convert.main, ["convert", *filled])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and not new.exists()


def test_help_is_the_modules_page(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    assert "python -m paligemma_jax.convert SRC DST" in capsys.readouterr().out
