"""`load`: inputs, resampling to another resolution, dtypes, and errors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from paligemma_jax.adapt.quantization.quantize import quantize
from paligemma_jax.files.shipped import SHIPPED
from paligemma_jax.models.vit import resample_positions
from paligemma_jax.tasks.common import SHARDING_RULES
from paligemma_jax.weights import reader as load_module
from paligemma_jax.weights.hugging_face.paligemma import save
from paligemma_jax.weights.reader import EMBEDDING, POSITIONS, load
from train_jax.core import param_tree
from train_jax.core.errors import UserError
from train_jax.parallel import sharding


@pytest.fixture(params=["bigvision_paligemma/params.npz", "hf_paligemma"], ids=["big_vision", "hugging_face"])
def path(request, golden):
    return golden / request.param


def arrays_of(model):
    return {name: np.asarray(array) for name, array in param_tree.flatten(model).items()}


@pytest.mark.parametrize(
    "source, method",
    [("bigvision_paligemma/params.npz", "bilinear"), ("hf_paligemma", "bicubic")],
    ids=["npz", "folder"],
)
def test_another_resolution_resamples_positions_with_the_familys_kernel(golden, source, method):
    small, large = load(golden / source), load(golden / source, image_size=42)
    before, after = arrays_of(small), arrays_of(large)
    np.testing.assert_array_equal(after.pop(POSITIONS), resample_positions(before.pop(POSITIONS), 6, method))
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert large.config.vision == dataclasses.replace(small.config.vision, image_size=42)
    assert large.config.preprocessing == dataclasses.replace(small.config.preprocessing, size=42)
    logits, out = large(jnp.zeros((1, 42, 42, 3)), jnp.ones((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32))
    assert out["image_features"].shape == (1, 36, 64) and bool(jnp.isfinite(logits).all())


def test_the_same_resolution_changes_nothing(path):
    same, plain = arrays_of(load(path, image_size=28)), arrays_of(load(path))
    assert all(np.array_equal(same[name], plain[name]) for name in plain)


def test_dtype_is_compute_and_parameter_dtype(path):
    model = load(path, "bfloat16")
    assert {array.dtype for array in param_tree.flatten(model).values()} == {jnp.dtype("bfloat16")}
    assert (model.config.vision.dtype, model.config.decoder.param_dtype) == ("bfloat16", "bfloat16")
    rounded = {name: array.astype(jnp.bfloat16) for name, array in arrays_of(load(path)).items()}
    assert all(np.array_equal(array, rounded[name]) for name, array in arrays_of(model).items())


def test_param_dtype_may_differ_from_the_compute_dtype(path):
    model = load(path, "bfloat16", param_dtype="float32")
    assert {array.dtype for array in param_tree.flatten(model).values()} == {jnp.dtype("float32")}
    assert model.config.decoder.dtype == "bfloat16"


def test_resampled_positions_keep_the_parameter_dtype(path):
    assert param_tree.flatten(load(path, "bfloat16", image_size=42))[POSITIONS].dtype == jnp.bfloat16


def test_remat_and_decoder_fields_reach_the_config(path):
    model = load(path, remat="block", final_softcap=30.0)
    assert (model.config.vision.remat, model.config.decoder.remat) == ("block", "block")
    assert model.config.decoder.final_softcap == 30.0


def test_a_big_vision_model_saved_for_transformers_loads_as_the_same_model(golden, tmp_path):
    model = load(golden / "bigvision_paligemma/params.npz")
    save(tmp_path / "saved", model.config, arrays_of(model), image_token=192)
    again = load(tmp_path / "saved")
    before, after = arrays_of(model), arrays_of(again)
    assert set(before) == set(after) and all(np.array_equal(after[name], before[name]) for name in before)
    assert again.config.decoder == model.config.decoder and again.config.vision == model.config.vision


def test_a_table_padded_to_a_round_vocabulary_loads_and_changes_no_logit(golden, tmp_path, hugging_face_case):
    """transformers pads 257,152 rows to 257,216: the extra rows only append logits."""
    model = load(golden / "hf_paligemma")
    arrays, name = arrays_of(model), "decoder/embed_tokens/embedding"
    arrays[name] = np.pad(arrays[name], ((0, 64), (0, 0)))
    config = model.config.replace(decoder=dict(vocab_size=224))
    save(tmp_path / "padded", config, arrays, image_token=150)
    assert load_file(tmp_path / "padded/model.safetensors")["language_model.model.embed_tokens.weight"].shape[0] == 224
    padded = load(tmp_path / "padded")
    assert padded.config.decoder.vocab_size == 224
    expected, _ = model(**hugging_face_case.inputs)
    logits, _ = padded(**hugging_face_case.inputs)
    np.testing.assert_allclose(logits[..., :160], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(logits[..., 160:], 0.0)


@pytest.mark.parametrize("rows", [100, 300])
def test_the_embedding_is_sliced_or_padded_to_vocab_size(path, rows):
    plain, model = load(path), load(path, vocab_size=rows)
    before, after = arrays_of(plain), arrays_of(model)
    table, changed = before.pop(EMBEDDING), after.pop(EMBEDDING)
    assert model.config.decoder.vocab_size == rows == len(changed)
    kept = min(rows, len(table))
    np.testing.assert_array_equal(changed[:kept], table[:kept])
    np.testing.assert_allclose(changed[kept:], np.tile(table.mean(0), (rows - kept, 1)), atol=1e-7)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_padding_adds_tokens_that_are_never_the_likeliest_and_slicing_removes_them(golden, tmp_path, hugging_face_case):
    padded = load(golden / "hf_paligemma", vocab_size=224)
    logits = np.asarray(padded(**hugging_face_case.inputs)[0])
    assert (logits[..., 160:].max(-1) < logits[..., :160].max(-1)).all()
    save(tmp_path / "padded", padded.config, arrays_of(padded), image_token=150)
    again, plain = arrays_of(load(tmp_path / "padded", vocab_size=160)), arrays_of(load(golden / "hf_paligemma"))
    assert all(np.array_equal(again[name], plain[name]) for name in plain)


@pytest.mark.usefixtures("fast_compilation")
def test_random_weights_are_created_with_their_sharding(small_config, monkeypatch):
    monkeypatch.setattr(load_module, "variant", lambda name: small_config)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def shardings(name, leaf):
        return sharding.shardings(mesh, SHARDING_RULES, {name: leaf})[0][name]

    arrays = param_tree.flatten(load("random:small", shardings=shardings))
    assert all(array.sharding == shardings(name, array) for name, array in arrays.items())
    assert not arrays[EMBEDDING].is_fully_replicated and np.std(arrays[EMBEDDING]) > 0


def test_leaves_are_placed_with_the_given_shardings(path):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    asked = {}

    def shardings(name, leaf):
        chosen, _ = sharding.shardings(mesh, SHARDING_RULES, {name: leaf})
        asked[name] = chosen[name]
        return chosen[name]

    model = load(path, shardings=shardings)
    plain = arrays_of(load(path))
    for name, array in param_tree.flatten(model).items():
        assert array.sharding.is_equivalent_to(asked[name], array.ndim)
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
    kernel = param_tree.flatten(model)["decoder/layers/mlp/gate_proj/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.parametrize("kind, options", [("nf4", dict(double=True)), ("int8", {}), ("int4", dict(block_size=128))])
def test_quantising_while_loading_equals_quantising_afterwards(path, kind, options):
    model = load(path, "bfloat16", quantize=kind, **options)
    expected = quantize(load(path, "bfloat16"), kind, options.get("block_size", 64), options.get("double", False))
    ours, theirs = arrays_of(model), arrays_of(expected)
    assert set(ours) == set(theirs) and any("/kernel/" in name for name in ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)


def test_zero_means_no_cap_as_in_big_visions_configs(path):
    assert load(path, final_softcap=0.0).config.decoder.final_softcap is None


def test_tiny_is_the_model_of_this_package(golden, monkeypatch):
    monkeypatch.setitem(SHIPPED, "tiny", golden / "hf_paligemma")
    assert load("tiny").config == load(golden / "hf_paligemma").config


def refused(match, *args, **options):
    with pytest.raises(UserError, match=match) as info:
        load(*args, **options)
    assert "\n" not in str(info.value)


def test_errors_are_one_sentence(path, tmp_path):
    refused("no model at .*nowhere: expected a Hugging Face folder, a big_vision .npz file", tmp_path / "nowhere")
    refused("no model at .*missing.npz", tmp_path / "missing.npz")
    (tmp_path / "model.bin").write_bytes(b"")
    refused("no model at .*model.bin", tmp_path / "model.bin")
    refused("dtype is 'float31', expected one of float32, bfloat16, float16", path, "float31")
    refused("dtype is 'int8'", path, param_dtype="int8")
    refused("image_size is 30, expected a multiple of the patch size 7: choose 28", path, image_size=30)
    refused("vocab_size is 0, expected at least 1", path, vocab_size=0)
    refused("quantize is 'nf5', expected one of nf4", path, quantize="nf5")
    refused("image_size is 0, expected a multiple of the patch size 7: choose 7", path, image_size=0)
