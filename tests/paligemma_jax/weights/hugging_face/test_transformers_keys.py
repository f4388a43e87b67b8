"""config.json and index files, key by key: what changes the model is read as transformers does, or refused by name."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paligemma_jax.models import encoder_block
from paligemma_jax.weights import save_hugging_face
from paligemma_jax.weights.hugging_face import config_values
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture
def changed(golden, tmp_path):
    """A copy of a golden folder whose config.json has other values; a tower's are given as an object."""

    def change(name, **keys):
        folder = shutil.copytree(golden / name, tmp_path / name, ignore=shutil.ignore_patterns("case.npz"))
        file = folder / "config.json"
        values = json.loads(file.read_text())
        for key, value in keys.items():
            values[key] = values[key] | value if key in ("text_config", "vision_config") else value
        file.write_text(json.dumps(values))
        return folder

    return change


def text(**keys):
    return {"text_config": keys}


def vision(**keys):
    return {"vision_config": keys}


SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
UNSCALED = {"rope_type": "default", "factor": 8.0, "original_max_position_embeddings": 64}  # no other key is read

# Read.

ACTIVATIONS = {  # our name, and whether the logits are compared
    "t_silu": ("hf_paligemma", text(hidden_act="silu", hidden_activation="silu"), "silu", True),
    "t_relu": ("hf_paligemma", text(hidden_act="relu"), "relu", False),
    "t_gelu": ("hf_paligemma", text(hidden_act="gelu"), "gelu_tanh", False),
    "t_gelu_python": ("hf_paligemma", text(hidden_act="gelu_python"), "gelu", False),
    "g2_gelu": ("hf_paligemma2", text(hidden_activation="gelu"), "gelu", True),
    "v_relu": ("hf_paligemma", vision(hidden_act="relu"), "relu", True),
    "v_quick_gelu": ("hf_paligemma", vision(hidden_act="quick_gelu"), "quick_gelu", False),
}


def last_logits(model, golden, name):
    """Returns the logits at the last real position of the golden's first row."""
    case = np.load(golden / name / "case.npz")
    real = int(case["attention_mask"][0].sum())
    kept = slice(model.config.vision.num_patches, real)
    images = case["pixel_values"][:1].transpose(0, 2, 3, 1)
    graph, arrays = param_tree.split(model)
    run = jax.jit(lambda arrays, *inputs: param_tree.merge(graph, arrays)(*inputs)[0])
    return np.asarray(run(arrays, images, case["input_ids"][:1, kept], case["token_type_ids"][:1, kept]))[0, -1]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_other_activations_are_those_of_transformers(changed, golden, name, tmp_path):
    source, keys, activation, compared = ACTIVATIONS[name]
    model = load(changed(source, **keys))
    assert activation == (model.config.vision if name.startswith("v_") else model.config.decoder).activation
    save_hugging_face(model, tmp_path / "again")
    assert load(tmp_path / "again").config == model.config
    if compared:
        expected = np.load(golden / "hf_activations/case.npz")[name]
        np.testing.assert_allclose(last_logits(model, golden, source), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("hf_paligemma", text(use_bidirectional_attention=False)),  # no effect in transformers either
        ("hf_paligemma", text(rope_scaling={"type": "default"}, rope_theta=10_000.0)),
        ("hf_paligemma", text(rope_scaling={"type": "linear", "factor": 1.0}, partial_rotary_factor=1.0)),
        ("hf_paligemma2", text(rope_parameters=UNSCALED | {"beta_fast": 32.0, "low_freq_factor": 1.0})),
        ("hf_paligemma", text(attention_dropout=0.1)),
        ("hf_siglip", vision(attention_dropout=0.2)),
        ("hf_clip", text(attention_dropout=0.5, dropout=0.1)),
        ("hf_paligemma", vision(hidden_act="gelu_python_tanh")),
        ("hf_paligemma", text(hidden_activation="gelu_pytorch_tanh", max_position_embeddings=77)),
        ("hf_paligemma2", text(hidden_act="gelu", cache_implementation="hybrid")),
        ("hf_paligemma", vision(projector_hidden_act="gelu_fast", image_size=[28, 28], num_image_tokens=16)),
        ("hf_paligemma", dict(hidden_size=2048, vocab_size=7, _vocab_size=7, torch_dtype="bfloat16", eos_token_id=[1])),
        ("hf_siglip", dict(quantization_config=None, is_encoder_decoder=False, pruned_heads={}, temperature=0.7)),
        ("hf_clip", text(projection_dim=512, bos_token_id=0)),
    ],
)
def test_keys_without_effect_change_nothing(changed, golden, name, keys):
    assert load(changed(name, **keys)).config == load(golden / name).config


def test_dropout_that_training_here_lacks_is_logged(changed, caplog):
    with caplog.at_level("WARNING"):
        load(changed("hf_paligemma", **text(attention_dropout=0.1), **vision(attention_dropout=0.0)))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "config.json has text_config.attention_dropout = 0.1 for training" in message


FORMULAS = {  # of transformers' names in its ACT2FN
    ("gelu", "gelu_python"): lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    ("gelu_fast",): lambda x: 0.5 * x * (1 + np.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_accurate"): lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    ("quick_gelu",): lambda x: x / (1 + np.exp(-1.702 * x)),
    ("silu", "swish"): lambda x: x / (1 + np.exp(-x)),
    ("relu",): lambda x: np.maximum(x, 0),
}


def test_activation_names_match_their_formulas():
    x = np.linspace(-8, 8, 1001)
    assert {name for names in FORMULAS for name in names} == set(config_values.ACTIVATIONS)
    for names, formula in FORMULAS.items():
        for name in names:
            result = encoder_block.ACTIVATIONS[config_values.ACTIVATIONS[name]](jnp.asarray(x, jnp.float32))
            np.testing.assert_allclose(result, formula(x), rtol=0, atol=2e-6, err_msg=name)


def test_token_ids_of_generation_config_are_the_tokenizers(changed):
    folder = changed("hf_paligemma")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1], "max_length": 20, "do_sample": True}))
    load(folder)
    file.write_text(json.dumps({"eos_token_id": [1, 107]}))
    with pytest.raises(UserError, match=r"generation_config.json has eos_token_id = \[1, 107\], expected 1 or \[1\]"):
        load(folder)


def test_missing_keys_of_a_clips_older_spelling_are_reset_to_defaults(changed, golden):
    """transformers completes text_config_dict with the class's defaults, which take precedence over text_config."""
    stored = json.loads((golden / "hf_clip/config.json").read_text())["text_config"]
    older = {key: value for key, value in stored.items() if key not in ("hidden_act", "layer_norm_eps")}
    model = load(changed("hf_clip", text_config=dict(hidden_act="gelu", layer_norm_eps=0.1), text_config_dict=older))
    assert (model.config.text.activation, model.config.text.eps) == ("quick_gelu", 1e-5)


# Refused, naming the file, the key and the value.


@pytest.mark.parametrize(
    "name, keys, sentence",
    [
        ("hf_paligemma", text(rope_parameters=SCALED), "text_config.rope_parameters.rope_type = 'linear'"),
        ("hf_paligemma", text(rope_scaling={"type": "llama3"}), "text_config.rope_scaling.type = 'llama3'"),
        ("hf_paligemma2", text(rope_scaling={"factor": 2.0}), "text_config.rope_scaling.factor = 2.0"),
        ("hf_paligemma", text(rope_parameters={"full_attention": SCALED}), "rope_parameters.full_attention = {"),
        ("hf_paligemma", text(rope_scaling={"type": "linear"}), "rope_scaling.type = 'linear', expected 'default', or"),
        ("hf_paligemma", text(rope_scaling=UNSCALED | {"type": "yarn"}), "rope_scaling.type = 'yarn'"),
        ("hf_paligemma", text(rope_scaling={"type": "linear", "factor": True}), "rope_scaling.type = 'linear'"),
        ("hf_paligemma2", text(rope_parameters=UNSCALED | {"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0"),
        ("hf_paligemma", text(partial_rotary_factor=0.5), "text_config.partial_rotary_factor = 0.5, expected 1.0"),
        ("hf_paligemma", text(rope_theta=500.0), "text_config.rope_theta = 500.0, expected 500 or 10000 at every"),
        ("hf_paligemma", text(hidden_act="mish"), "text_config.hidden_act = 'mish', expected one of"),
        ("hf_paligemma", text(hidden_activation="silu"), "hidden_activation = 'silu', expected the gelu_pytorch_tanh"),
        ("hf_paligemma2", text(hidden_act="silu"), "text_config.hidden_act = 'silu', expected the gelu_pytorch"),
        ("hf_paligemma", text(attention_bias=True), "text_config.attention_bias = True, expected False"),
        ("hf_paligemma", text(attention_dropout="0.1"), "text_config.attention_dropout = '0.1', expected a share"),
        ("hf_siglip", vision(attention_dropout=1), "vision_config.attention_dropout = 1, expected a share"),
        ("hf_paligemma2", text(attn_logit_softcapping=[]), r"attn_logit_softcapping = \[\], expected a positive"),
        ("hf_paligemma2", text(layer_types=[]), r"layer_types = \[\], expected sliding_attention and"),
        ("hf_paligemma2", text(num_hidden_layers=1 << 70), "num_hidden_layers = 118.*, expected a positive number"),
        ("hf_paligemma", text(tie_word_embeddings="false"), "tie_word_embeddings = 'false', expected True or"),
        ("hf_paligemma", dict(image_token_index="<image>"), "image_token_index = '<image>', expected one token"),
        ("hf_paligemma", dict(image_token_id=7), "image_token_id = 7, expected one token's id, the same at"),
        ("hf_paligemma", text(attn_logit_softcapping=5.0), "attn_logit_softcapping = 5.0, expected no unknown key"),
        ("hf_paligemma", text(layer_types=["sliding_attention"] * 3), "layer_types = .*for every layer of a Gemma"),
        ("hf_paligemma", text(vocab_size=161), "text_config.vocab_size = 161, expected 160, as .* has"),
        ("hf_paligemma", text(rms_norm_eps=-1.0), "text_config.rms_norm_eps = -1.0, expected a positive number"),
        ("hf_paligemma", vision(hidden_act="mish"), "vision_config.hidden_act = 'mish'"),
        ("hf_paligemma", vision(image_size=56), "vision_config.image_size = 56, expected 28"),
        ("hf_paligemma", vision(patch_size=14), "vision_config.patch_size = 14, expected 7"),
        ("hf_paligemma", vision(num_channels=1), "vision_config.num_channels = 1, expected 3"),
        ("hf_paligemma", vision(model_type="clip_vision_model"), "vision_config.model_type = 'clip_vision_model'"),
        ("hf_paligemma", dict(tie_word_embeddings=False), "tie_word_embeddings = False, expected true"),
        ("hf_paligemma", dict(eos_token_id=[1, 107]), r"eos_token_id = \[1, 107\], expected 1"),
        ("hf_paligemma", dict(projection_dim=65), "projection_dim = 65, expected 64"),
        ("hf_paligemma", dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no', expected True or False"),
        ("hf_paligemma", text(tie_word_embeddings=0), "text_config.tie_word_embeddings = 0, expected True or False"),
        ("hf_paligemma", text(model_type=["gemma"]), r"a text model \['gemma'\], expected 'gemma'"),
        ("hf_paligemma", dict(image_token_index="<image>"), "image_token_index = '<image>', expected one token's id"),
        ("hf_paligemma", dict(image_token_id=5), "image_token_id = 5, expected one token's id, the same at"),
        ("hf_paligemma", dict(quantization_config={"bits": 4}), "quantization_config = .'bits': 4., expected no"),
        ("hf_siglip", text(hidden_act="mish"), "text_config.hidden_act = 'mish'"),
        ("hf_siglip", text(max_position_embeddings=64), "max_position_embeddings = 64, expected 12"),
        ("hf_siglip", vision(vision_use_head=False), "vision_config.vision_use_head = False, expected True"),
        ("hf_siglip", dict(novel=["x"]), r"novel = \['x'\], expected no unknown key"),
        ("hf_clip", text(hidden_act="gelu_10"), "text_config.hidden_act = 'gelu_10', expected one of"),
        ("hf_clip", dict(text_config_dict=[1]), r"text_config_dict = \[1\], expected an object"),
        ("hf_clip", dict(text_config_dict={}), "text_config.vocab_size = 49408, expected 120"),  # the class's defaults
        ("hf_clip", text(eos_token_id=500), "text_config.eos_token_id = 500, expected one id below the 120"),
        ("hf_clip", dict(projection_dim=25), "projection_dim = 25, expected 24"),
        ("hf_clip", vision(hidden_size=64), "vision_config.hidden_size = 64, expected 48"),
    ],
)  # fmt: skip
def test_values_of_another_model_are_refused(changed, name, keys, sentence):
    with pytest.raises(UserError, match=rf"config.json has .*{sentence}") as info:
        load(changed(name, **keys))
    assert "\n" not in str(info.value)


# Index files: transformers prefers a single file.


def test_a_single_file_takes_precedence_over_an_index(changed, golden):
    folder = changed("hf_siglip")
    arrays = load_file(folder / "model.safetensors")
    stale = {name: array + 1 for name, array in arrays.items()}
    save_file(stale, folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")})
    )
    expected = param_tree.flatten(load(golden / "hf_siglip"))
    for _ in range(2):
        for path, array in param_tree.flatten(load(folder)).items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
        (folder / "model-00001-of-00001.safetensors").unlink(missing_ok=True)  # an index whose shards are missing
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model-00001-of-00001.safetensors cannot be read"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "b"}, "novel": 1}))
    with pytest.raises(UserError, match="index.json has novel = 1"):
        load(folder)
