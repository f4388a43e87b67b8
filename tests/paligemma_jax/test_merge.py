"""The command that merges adapters: from a peft folder, from a run, errors; and runs written as peft folders."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import paligemma_jax as pg
from paligemma_jax import convert, merge
from paligemma_jax.adapt.lora.adapter import merge_lora
from paligemma_jax.weights import load_peft
from train_jax.config import command_line
from train_jax.core import param_tree

pytestmark = pytest.mark.usefixtures("fast_compilation")


def assert_same_arrays(model, expected):
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path, strict=True)


@pytest.mark.parametrize("place, options", [("hf", []), ("model.npz", []), ("orbax", ["--format=orbax"])])
def test_a_base_and_a_peft_folder(golden, hugging_face_model, tmp_path, capsys, place, options):
    adapter = golden / "hf_peft_lora/adapter_dora"
    merge.main(["merge", str(golden / "hf_paligemma"), f"--adapter={adapter}", str(tmp_path / place), *options])
    assert_same_arrays(pg.load(tmp_path / place), merge_lora(load_peft(nnx.clone(hugging_face_model), adapter)))
    wrote, _, gap = capsys.readouterr().out.partition("; merging changed logits by ")
    assert wrote == f"wrote {tmp_path / place}" and 0 < float(gap.split()[0]) < 2e-4


def test_a_run(mini_run, tmp_path):
    place, gap = merge.merge(str(mini_run), str(tmp_path / "out"))
    assert_same_arrays(pg.load(place), merge_lora(pg.load(mini_run)))
    assert gap < 1e-3 and (place / "tokenizer.model").exists()


def test_a_run_as_a_peft_folder(mini_run, mini_folder, tmp_path):
    """The folder that peft would open on the run's base gives the run's model."""
    convert.main(["convert", str(mini_run), str(tmp_path / "peft"), "--format=peft"])
    assert_same_arrays(pg.load(mini_folder, adapter=tmp_path / "peft"), pg.load(mini_run))
    shapes = {key: array.shape for key, array in load_file(tmp_path / "peft/adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_B.weight"] == (32, 8)
    place, _ = merge.merge(str(mini_folder), str(tmp_path / "out"), adapter=str(tmp_path / "peft"))
    assert_same_arrays(pg.load(place), merge_lora(pg.load(mini_run)))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{base}"], "expected RUN_OR_BASE [--adapter=FOLDER] DST"),
        (["{base}", "{new}"], "is no run and has no adapters, expected --adapter=FOLDER"),
        (["{base}", "--adapter={new}", "{new}"], "holds no adapter_config.json"),
        (["{base}", "--adapter={adapter}", "{base}"], "exists already"),
        (
            ["{base}", "--adapter={adapter}", "{new}", "--format=peft"],
            "expected one of hugging_face, big_vision, orbax",
        ),
        (["{new}", "--adapter={adapter}", "{new}"], "no model at"),
        (["{base}", "--adapter={adapter}", "{new}", "--rank=8"], "rank"),
    ],
)
def test_errors_are_one_sentence_and_write_nothing(golden, tmp_path, capsys, arguments, sentence):
    new = tmp_path / "new"
    places = {"base": golden / "hf_paligemma", "adapter": golden / "hf_peft_lora/adapter_qo", "new": new}
    with pytest.raises(SystemExit) as stopped:
        command_line.run(merge.main, ["merge", *(argument.format(**places) for argument in arguments)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and not new.exists()


def test_a_run_brings_its_own_adapter(mini_run, golden, tmp_path, capsys):
    adapter = golden / "hf_peft_lora/adapter_qo"
    with pytest.raises(SystemExit):
        command_line.run(merge.main, ["merge", str(mini_run), f"--adapter={adapter}", str(tmp_path / "out")])
    assert "is a run, loaded with adapter, expected no such options" in capsys.readouterr().err
    convert_base = ["convert", str(golden / "hf_paligemma"), str(tmp_path / "out"), "--format=peft"]
    with pytest.raises(SystemExit):
        command_line.run(convert.main, convert_base)
    assert "no LoRA adapters to save" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_is_the_modules_page(capsys):
    with pytest.raises(SystemExit, match="0"):
        merge.main(["merge", "--help"])
    assert "python -m paligemma_jax.merge RUN_OR_BASE" in capsys.readouterr().out
