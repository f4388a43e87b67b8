"""Parity with transformers on its golden case, all spellings of names, saving, and broken folders."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paligemma_jax.losses import token_cross_entropy
from paligemma_jax.weights.hugging_face import paligemma as hugging_face
from paligemma_jax.weights.hugging_face.folder import Folder, canonical
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree
from train_jax.core.errors import UserError

EMBEDDING = "language_model.model.embed_tokens.weight"
LAYER_0 = "language_model.model.layers.0."


@pytest.fixture(scope="module")
def stored(golden):
    return load_file(golden / "hf_paligemma/model.safetensors")


@pytest.fixture(scope="module")
def forward(hugging_face_model, hugging_face_case):
    return hugging_face_model(**hugging_face_case.inputs)


@pytest.fixture
def write(golden, tmp_path):
    """Writes a folder with the golden's config and the given arrays."""

    def folder(arrays, **config):
        values = json.loads((golden / "hf_paligemma/config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(values | config))
        save_file(arrays, tmp_path / "model.safetensors")
        return tmp_path

    return folder


def assert_same_parameters(model, expected):
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


# Tolerances as the golden README asks.


def test_image_features_equal_transformers(forward, hugging_face_case):
    stored = hugging_face_case.stored
    np.testing.assert_allclose(forward[1]["vision/encoded"], stored["vision_last_hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(forward[1]["image_features"], stored["image_features"], rtol=0, atol=1e-4)


def test_logits_equal_transformers(forward, hugging_face_case):
    expected = hugging_face_case.stored["logits"][:, hugging_face_case.patches :]
    real = hugging_face_case.real
    np.testing.assert_allclose(np.asarray(forward[0])[real], expected[real], rtol=0, atol=2e-4)


def test_loss_equals_transformers(forward, hugging_face_model, hugging_face_case):
    case, table = hugging_face_case, hugging_face_model.decoder.embed_tokens.embedding[...]
    total = token_cross_entropy(forward[1]["hidden"], table, case.targets, case.weights)
    np.testing.assert_allclose(total / case.weights.sum(), case.stored["loss"], rtol=0, atol=2e-5)


def test_sizes_are_read_from_config_and_arrays(hugging_face_model):
    vision, decoder = hugging_face_model.config.vision, hugging_face_model.config.decoder
    assert (vision.image_size, vision.patch_size, vision.width, vision.depth) == (28, 7, 48, 2)
    assert (vision.mlp_dim, vision.num_heads) == (96, 4)
    assert (decoder.vocab_size, decoder.width, decoder.depth, decoder.mlp_dim) == (160, 64, 3, 128)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 1, 16)
    assert hugging_face_model.config.preprocessing.source == "transformers"


# Spellings and layouts of files.

SPELLINGS = {
    "in memory": {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."},
    "in memory, old": {"vision_tower.": "model.vision_tower.vision_model."},
    "hub": {"vision_tower.": "vision_tower.vision_model."},
    "projector": {"multi_modal_projector.": "model.multi_modal_projector."},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_reads_all_spellings_of_names(write, stored, hugging_face_model, spelling):
    renamed = {}
    for name, array in stored.items():
        for old, new in spelling.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        renamed[name] = array
    assert set(renamed) != set(stored)
    assert_same_parameters(load(write(renamed)), hugging_face_model)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"])
def test_a_second_copy_of_the_tied_table_is_accepted(write, stored, hugging_face_model, name):
    assert_same_parameters(load(write(stored | {name: stored[EMBEDDING].copy()})), hugging_face_model)


def test_canonical_spelling_is_a_fixed_point():
    for row in hugging_face.rows():
        assert canonical(row.theirs) == row.theirs
    assert canonical("something.else") == "something.else"


def write_shards(folder, golden, stored, count=3):
    """The golden as `count` shards with an index; returns the path of the index."""
    shutil.copy(golden / "hf_paligemma/config.json", folder)
    names, weight_map = sorted(stored), {}
    for i in range(count):
        file, part = f"model-{i + 1:05d}-of-{count:05d}.safetensors", names[i::count]
        save_file({name: stored[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_reads_shards_with_an_index(tmp_path, golden, stored, hugging_face_model):
    write_shards(tmp_path, golden, stored)
    assert_same_parameters(load(tmp_path), hugging_face_model)


def test_reads_bfloat16(write, stored):
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in stored.items()}
    model = load(write(rounded), param_dtype="bfloat16")
    table = model.decoder.embed_tokens.embedding[...]
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(table), rounded[EMBEDDING])


def test_reads_old_configs_that_leave_sizes_out(write, stored, golden):
    config = json.loads((golden / "hf_paligemma/config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k not in ("rope_parameters", "rms_norm_eps")}
    model = load(write(stored, text_config=text | {"rope_theta": 500.0}))
    assert model.config.decoder.rope_theta == 500.0
    assert load(write(stored, text_config=text)).config.decoder.rope_theta == 10_000.0
    assert model.config.decoder.eps == 1e-6


def test_a_preprocessor_config_decides_the_preprocessing(write, stored, hugging_face_model):
    folder = write(stored)
    values = hugging_face_model.config.preprocessing.to_hugging_face()
    (folder / "preprocessor_config.json").write_text(json.dumps(values | {"image_mean": [0.1, 0.2, 0.3]}))
    assert load(folder).config.preprocessing.mean == (0.1, 0.2, 0.3)


# Saving.


def test_saving_gives_back_the_arrays_of_transformers(tmp_path, hugging_face_model, stored):
    arrays = {path: np.asarray(array) for path, array in param_tree.flatten(hugging_face_model).items()}
    hugging_face.save(tmp_path / "saved", hugging_face_model.config, arrays, image_token=150)
    saved = load_file(tmp_path / "saved/model.safetensors")
    expected = {canonical(name): array for name, array in stored.items()}
    assert set(saved) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)


def test_save_then_load_gives_back_the_model(tmp_path, hugging_face_model):
    arrays = {path: np.asarray(array) for path, array in param_tree.flatten(hugging_face_model).items()}
    hugging_face.save(tmp_path / "saved", hugging_face_model.config, arrays, image_token=150)
    again = load(tmp_path / "saved")
    assert_same_parameters(again, hugging_face_model)
    assert again.config == hugging_face_model.config


def test_saved_config_agrees_with_transformers(tmp_path, golden, hugging_face_model):
    arrays = {path: np.asarray(array) for path, array in param_tree.flatten(hugging_face_model).items()}
    hugging_face.save(tmp_path / "saved", hugging_face_model.config, arrays, image_token=150)
    ours = json.loads((tmp_path / "saved/config.json").read_text())
    theirs = json.loads((golden / "hf_paligemma/config.json").read_text())
    theirs["text_config"]["rope_theta"] = theirs["text_config"].pop("rope_parameters")["rope_theta"]
    for section in ("text_config", "vision_config"):
        ours_section, theirs_section = ours.pop(section), theirs.pop(section)
        assert ours_section == {name: theirs_section[name] for name in ours_section}
    assert ours == {name: theirs[name] for name in ours}


# Broken folders: one sentence each.


def refused(path, match):
    with pytest.raises(UserError, match=match) as info:
        load(path)
    assert "\n" not in str(info.value)


def test_lists_missing_and_unused_arrays(write, stored):
    changed = dict(stored)
    changed["language_model.model.norm.bias"] = changed.pop("language_model.model.norm.weight")
    refused(
        write(changed),
        "missing language_model.model.norm.weight; not used language_model.model.norm.bias.*architecture",
    )


def test_lists_a_missing_layer(write, stored):
    refused(
        write({name: array for name, array in stored.items() if not name.startswith(LAYER_0)}),
        rf"missing {LAYER_0}input_layernorm.weight, .* and 1 more; not used nothing",
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        (f"{LAYER_0}mlp.up_proj.weight", (64, 128)),  # as many numbers, other axes
        (f"{LAYER_0}self_attn.q_proj.weight", (64, 63)),
        ("vision_tower.encoder.layers.1.self_attn.q_proj.bias", (47,)),
        ("vision_tower.embeddings.patch_embedding.weight", (48, 7, 7, 3)),
        ("multi_modal_projector.linear.bias", (8, 8)),
    ],
)
def test_refuses_arrays_of_other_shapes(write, stored, name, shape):
    refused(write(stored | {name: np.zeros(shape, np.float32)}), "belongs to a|does not match")


def test_names_the_file_and_the_array_of_another_shape(write, stored):
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    refused(
        write(stored | {name: np.zeros((64, 128), np.float32)}),
        rf"{name} has shape \(64, 128\), but decoder/layers/mlp/up_proj/kernel needs \(128, 64\)",
    )


def test_refuses_an_array_of_another_rank(write, stored):
    refused(write(stored | {EMBEDDING: np.zeros(160, np.float32)}), r"has shape \(160,\), expected 2 axes")


def test_refuses_an_array_under_two_names(write, stored):
    twice = stored | {"model.language_model.norm.weight": np.zeros(64, np.float32)}
    refused(write(twice), "holds one array twice, as .*norm.weight and as .*norm.weight")


def test_refuses_an_untied_output_table(write, stored):
    refused(write(stored | {"lm_head.weight": stored[EMBEDDING] + 1}), "lm_head.weight differs from .*embed_tokens")


def test_refuses_a_folder_of_another_model(write, stored):
    refused(write({"kernel": np.zeros(3, np.float32)}), "has no array .*: it is not a PaliGemma")
    refused(write(stored, model_type="llava"), "describes a 'llava' model, expected 'paligemma'")


def test_refuses_a_config_without_a_needed_size(write, stored):
    refused(write(stored, vision_config={"intermediate_size": 96}), "lacks vision_config.num_hidden_layers")
    refused(write(stored, text_config={}), "lacks text_config.model_type")
    refused(write(stored, text_config=[1]), "lacks text_config.model_type")
    sizes = dict(num_hidden_layers=2, intermediate_size=96)
    for heads in (0, -4, "4", 4.0, True):
        refused(write(stored, vision_config=sizes | dict(num_attention_heads=heads)), "expected a positive number")


def test_refuses_decoders_that_are_not_gemmas(write, stored, golden):
    text = json.loads((golden / "hf_paligemma2/config.json").read_text())["text_config"]
    refused(
        write(stored, text_config=text | {"model_type": "llama"}), "text model 'llama', expected 'gemma' or 'gemma2'"
    )
    layers = ["full_attention", "sliding_attention"] * 2
    refused(
        write(stored, text_config=text | {"layer_types": layers}), "expected sliding_attention and full_attention in"
    )


def test_refuses_folders_without_config_or_weights(tmp_path, golden, stored):
    refused(tmp_path, "holds no model.safetensors and no model.safetensors.index.json")
    save_file(stored, tmp_path / "model.safetensors")
    refused(tmp_path, "holds no config.json: give a folder as transformers saves it")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_refuses_broken_json(write, stored, text):
    folder = write(stored)
    (folder / "preprocessor_config.json").write_text(text)
    refused(folder, "preprocessor_config.json .*: download it again")
    (folder / "config.json").write_text(text)
    refused(folder, "/config.json .*: download it again")


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_refuses_truncated_safetensors(write, stored, keep):
    folder = write(stored)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    refused(folder, r"model.safetensors cannot be read as safetensors .*: download it again")


def test_refuses_a_missing_shard(tmp_path, golden, stored):
    write_shards(tmp_path, golden, stored)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors cannot be read")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_refuses_an_index_that_leaves_the_folder(tmp_path, golden, stored, outside):
    folder = tmp_path / "model"
    folder.mkdir()
    index = write_shards(folder, golden, stored)
    save_file({"norm": np.zeros(1, np.float32)}, tmp_path / "secret.safetensors")
    values = json.loads(index.read_text())
    values["weight_map"][EMBEDDING] = outside
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="outside its folder: shards must lie beside it"):
        Folder(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}'])
def test_refuses_a_broken_index(tmp_path, golden, stored, text):
    write_shards(tmp_path, golden, stored).write_text(text)
    refused(tmp_path, "model.safetensors.index.json .*: download it again")
