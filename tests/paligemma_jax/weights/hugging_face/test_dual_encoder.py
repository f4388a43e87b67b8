"""SigLIP and CLIP read and written in every format, converted, and the sizes of the released ones."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import paligemma_jax as pg
from paligemma_jax import convert
from paligemma_jax.data.tokenizers.text_tower import load_text_tokenizer
from paligemma_jax.images.preprocessing import CLIP_MEAN, Preprocessing
from paligemma_jax.models.dual_encoder import DualEncoder
from paligemma_jax.models.paligemma import variant as paligemma_variant
from paligemma_jax.models.variants import NAMES, variant
from paligemma_jax.weights import save_big_vision, save_hugging_face, save_orbax
from paligemma_jax.weights.hugging_face.dual_encoder_config import read_config
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree
from train_jax.core.errors import UserError

# Parameters of transformers' models of these sizes (5.23.0, on the meta device).
COUNTS = {
    "mini": 1_172_626,
    "siglip-b16-224": 203_155_970,
    "siglip-b16-256": 203_202_050,
    "siglip-b16-384": 203_447_810,
    "siglip-b16-512": 203_791_874,
    "siglip-l16-256": 652_150_786,
    "siglip-l16-384": 652_478_466,
    "siglip-so400m14-224": 877_360_306,
    "siglip-so400m14-384": 877_960_498,
    "siglip2-b16-224": 375_187_970,
    "siglip2-b16-256": 375_234_050,
    "siglip2-b16-384": 375_479_810,
    "siglip2-b16-512": 375_823_874,
    "siglip2-l16-256": 881_526_786,
    "siglip2-l16-384": 881_854_466,
    "siglip2-l16-512": 882_313_218,
    "siglip2-so400m14-224": 1_135_463_602,
    "siglip2-so400m14-384": 1_136_008_498,
    "siglip2-so400m16-256": 1_135_670_962,
    "siglip2-so400m16-384": 1_136_039_602,
    "siglip2-so400m16-512": 1_136_555_698,
    "clip-b32-224": 151_277_313,
    "clip-b16-224": 149_620_737,
    "clip-l14-224": 427_616_513,
    "clip-l14-336": 427_944_193,
    "tiny": 1_904_258,
}

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def models(golden):
    """Read-only."""
    sources = {"siglip": "hf_siglip", "clip": "hf_clip", "big_vision": "bigvision_siglip/params.npz"}
    return {name: pg.load(golden / source) for name, source in sources.items()}


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the golden SigLIP, to change."""
    return shutil.copytree(golden / "hf_siglip", tmp_path / "hf_siglip")


def assert_same_model(model, expected):
    assert isinstance(model, DualEncoder)
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path, strict=True)
    assert (model.config.vision, model.config.text) == (expected.config.vision, expected.config.text)


def refused(sentence, function, *arguments, **options):
    with pytest.raises(UserError, match=sentence):
        function(*arguments, **options)


def test_round_trip_through_all_formats(models, tmp_path):
    """From transformers to big_vision, to ours, and back: arrays and embeddings are equal bit for bit."""
    model = models["siglip"]
    save_big_vision(model, tmp_path / "a.npz")
    save_orbax(load(tmp_path / "a.npz"), tmp_path / "b")
    save_hugging_face(load(tmp_path / "b"), tmp_path / "c", max_shard_size=50_000)
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) > 1
    for place in ("a.npz", "b", "c"):
        assert_same_model(load(tmp_path / place), model)


def test_clip_is_kept_by_transformers_and_by_ours(models, tmp_path, golden):
    model = models["clip"]
    save_hugging_face(model, tmp_path / "a")
    save_orbax(load(tmp_path / "a"), tmp_path / "b")
    for place in ("a", "b"):
        again = load(tmp_path / place)
        assert_same_model(again, model)
        assert again.config == model.config
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "a", golden / "hf_clip"))
    assert {name: array.shape for name, array in ours.items()} == {k: a.shape for k, a in theirs.items()}
    refused("cannot hold a CLIP", save_big_vision, model, tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_saved_config_agrees_with_transformers(models, tmp_path, golden, name):
    save_hugging_face(models[name], tmp_path / "a")
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "a", golden / f"hf_{name}"))
    unread = {"bos_token_id", "pad_token_id"}  # by the models
    for tower in ("text_config", "vision_config"):
        same = ours[tower].keys() & theirs[tower].keys() - unread
        assert {key: ours[tower][key] for key in same} == {key: theirs[tower][key] for key in same}
        assert len(same) >= 9
    assert ours["model_type"] == theirs["model_type"] and ours["architectures"] == theirs["architectures"]


def test_a_big_vision_file_is_written_as_released_ones_are(models, tmp_path, golden):
    save_big_vision(models["big_vision"], tmp_path / "x.npz")
    ours, theirs = np.load(tmp_path / "x.npz"), np.load(golden / "bigvision_siglip/params.npz")
    assert set(ours.files) == set(theirs.files)
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name, strict=True)


def test_bfloat16_and_quantised_kernels(models, golden, tmp_path):
    model = load(golden / "hf_clip", "bfloat16")
    save_hugging_face(model, tmp_path / "a")
    assert_same_model(load(tmp_path / "a", "bfloat16"), model)
    kept = load(golden / "hf_siglip", quantize="int8")
    save_orbax(kept, tmp_path / "b")
    assert_same_model(load(tmp_path / "b"), kept)
    refused("dequantize", save_hugging_face, kept, tmp_path / "c")


def test_all_keys_are_accounted_for_both_ways(folder):
    file = folder / "model.safetensors"
    arrays = load_file(file)
    head = arrays.pop("vision_model.head.probe")
    save_file(arrays, file)
    refused(r"missing vision_model\.head\.probe; not used nothing", load, folder)
    save_file(arrays | {"vision_model.head.probe": head, "extra": head}, file)
    refused("missing nothing; not used extra", load, folder)
    # Releases of transformers before 4.31 stored the constants 0, 1, 2, ... beside the weights.
    positions = {f"{tower}_model.embeddings.position_ids": np.arange(4)[None] for tower in ("vision", "text")}
    save_file(arrays | {"vision_model.head.probe": head} | positions, file)
    load(folder)


def test_a_probe_of_another_size_is_refused(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["vision_model.head.probe"] = arrays["vision_model.head.probe"][..., :-1]
    save_file(arrays, folder / "model.safetensors")
    refused("vision_model.head.probe has shape .* but image_head/probe needs", load, folder)


def test_preprocessing_is_the_folders_own(folder, models):
    size = models["siglip"].config.vision.image_size
    assert models["siglip"].config.preprocessing == Preprocessing.siglip(size)
    assert models["big_vision"].config.preprocessing == Preprocessing.big_vision(size)
    clip = models["clip"].config.preprocessing
    assert clip == Preprocessing.clip(size) and clip.crop and clip.mean == CLIP_MEAN
    values = Preprocessing.siglip(size).to_hugging_face() | {"resample": 2}  # bilinear, as of SigLIP 2
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    model = load(folder)
    assert model.config.preprocessing.method == "bilinear"
    save_hugging_face(model, folder / "again")
    assert load(folder / "again").config.preprocessing == model.config.preprocessing


def test_configs_with_missing_keys_get_defaults(tmp_path):
    """As in SigLIP 2 B/16 at 512 pixels: model_type siglip, and two numbers."""
    config = {"model_type": "siglip", "text_config": {"vocab_size": 256_000}, "vision_config": {"image_size": 512}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for values in (read_config(tmp_path)[tower] for tower in ("text_config", "vision_config")):
        assert (values["num_hidden_layers"], values["num_attention_heads"], values["intermediate_size"]) == (
            12,
            12,
            3072,
        )
        assert (values["layer_norm_eps"], values["hidden_act"]) == (1e-6, "gelu_pytorch_tanh")


def test_sizes_of_the_released_models():
    assert set(COUNTS) == set(NAMES)
    for name, count in COUNTS.items():
        config = variant(name)
        shapes = param_tree.abstract(nnx.eval_shape(lambda config=config: DualEncoder(config, rngs=nnx.Rngs(0))))
        assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == count, name
        assert config.preprocessing.size == config.vision.image_size
    refused("variant 'siglip-b16-225' is unknown", load, "random:siglip-b16-225")


def test_the_tiny_siglip_has_the_tiny_paligemmas_tower_and_vocabulary():
    config = variant("tiny")
    assert config.vision == paligemma_variant("tiny").vision
    load_text_tokenizer("tiny", config.text.length).fits(config.text.vocab_size)


def test_random_weights_of_a_variant():
    model = pg.load("random:siglip-tiny")
    arrays = param_tree.flatten(model)
    assert model.config == variant("tiny")
    assert float(model.logit_scale[...]) == pytest.approx(math.log(10)) and float(model.logit_bias[...]) == -10
    assert not jnp.array_equal(arrays["text/layers/mlp/fc1/kernel"][0], arrays["text/layers/mlp/fc1/kernel"][1])


@pytest.mark.parametrize("kind, file", [("siglip", "spiece.model"), ("clip", "tokenizer.json")])
def test_the_command_converts_with_the_tokenizer(golden, tmp_path, capsys, models, make_random, kind, file):
    files, source = golden / f"text_tokenizers/{kind}", tmp_path / "source"
    words, config = load_text_tokenizer(files), models[kind].config
    text = dict(vocab_size=words.vocab_size, eos_token=words.eos_id if kind == "clip" else None)
    config = config.replace(text=text)
    model = make_random(nnx.eval_shape(lambda: pg.DualEncoder(config, rngs=nnx.Rngs(0))))
    save_hugging_face(model, source)
    shutil.copytree(files, source, dirs_exist_ok=True)
    formats = {"hugging_face": "hf", "orbax": "orbax"} | ({"big_vision": "x.npz"} if kind == "siglip" else {})
    for format, place in formats.items():
        convert.main(["convert", str(source), str(tmp_path / place), f"--format={format}"])
        assert_same_model(pg.load(tmp_path / place), model)
        tokens, _ = load_text_tokenizer(tmp_path / place, 12)(["a red cube"])
        np.testing.assert_array_equal(tokens, load_text_tokenizer(source, 12)(["a red cube"])[0])
    values = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    if kind == "siglip":  # its length is the default
        assert values["model_max_length"] == load_text_tokenizer(tmp_path / "hf").length == config.text.length
    assert values["tokenizer_class"] == ("SiglipTokenizer" if kind == "siglip" else "CLIPTokenizer")
    refused("no adapters for --format=peft", convert.convert, str(source), str(tmp_path / "p"), "peft")


def test_options_that_a_dual_encoder_lacks_are_refused(golden, tmp_path):
    refused("no decoder: leave out final_softcap", load, golden / "hf_clip", final_softcap=30.0)
    refused("whose vocabulary is fixed", load, golden / "hf_clip", vocab_size=7)
    refused(
        "is a dual encoder, expected a whole model",
        pg.load,
        golden / "hf_clip",
        adapter=golden / "hf_peft_lora/adapter_rslora",
    )
    other = {"model_type": "siglip2", "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    refused("NaFlex", load, tmp_path)
