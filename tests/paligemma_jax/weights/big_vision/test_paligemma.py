"""Parity with big_vision on its golden case; odd and broken npz files."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from paligemma_jax.losses import loss_weights, token_cross_entropy
from paligemma_jax.models.attention import prefix_mask
from paligemma_jax.models.paligemma import join_masks
from paligemma_jax.weights.big_vision import paligemma as big_vision
from paligemma_jax.weights.reader import load
from train_jax.core import param_tree
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

BLOCK = "img/Transformer/encoderblock"


@pytest.fixture(scope="module")
def stored(golden):
    """The golden parameters by name, without the `params/` prefix."""
    file = np.load(golden / "bigvision_paligemma/params.npz")
    return {name.removeprefix("params/"): file[name] for name in file.files}


@pytest.fixture(scope="module")
def batch(big_vision_case):
    """Training inputs as the trainer feeds them: the last token is only a target."""
    case = {name: jnp.asarray(big_vision_case[name]) for name in ("image", "text", "mask_ar", "mask_loss")}
    return dict(
        images=case["image"],
        tokens=case["text"][:, :-1],
        mask_ar=case["mask_ar"][:, :-1],
        targets=case["text"][:, 1:],
        mask_loss=case["mask_loss"][:, 1:],
    )


@pytest.fixture(scope="module")
def forward(big_vision_model, batch):
    return big_vision_model(batch["images"], batch["tokens"], batch["mask_ar"])


@pytest.fixture(scope="module")
def loss_and_gradients(big_vision_model, batch):
    """The trainer's loss, mean over examples of the mean over their supervised tokens, as a function of mask_loss."""
    graph, arrays = param_tree.split(big_vision_model)

    def loss(arrays, mask_loss):
        model = param_tree.merge(graph, arrays)
        features, _ = model.encode_image(batch["images"])
        hidden, _ = model.hidden(features, batch["tokens"], batch["mask_ar"])
        weights, examples = loss_weights(mask_loss, "example_mean")
        table = model.decoder.embed_tokens.embedding[...]
        return token_cross_entropy(hidden, table, batch["targets"], weights) / examples

    return functools.partial(jax.jit(jax.value_and_grad(loss)), arrays)


# Tolerances: ten times the float64 row of the golden README.


@pytest.mark.parametrize(
    "ours, theirs, atol",
    [
        ("vision/patches", "img_stem", 2e-5),
        ("vision/embedded", "img_with_posemb", 2e-5),
        ("vision/encoded", "img_encoded", 2e-5),
        ("image_features", "zimg", 3.1e-5),
        ("embedded", "ztxt", 2e-5),
        ("encoded", "llm_encoded", 9.4e-5),
    ],
)
def test_intermediates_equal_big_vision(forward, big_vision_case, ours, theirs, atol):
    expected = big_vision_case[theirs]
    np.testing.assert_allclose(forward[1][ours].reshape(expected.shape), expected, rtol=0, atol=atol)


def test_hidden_states_and_logits_equal_big_vision(forward, big_vision_case):
    logits, out = forward
    text = big_vision_case["pre_logits"][:, -logits.shape[1] :]
    np.testing.assert_allclose(out["hidden"], text, rtol=0, atol=9.4e-5)
    np.testing.assert_allclose(logits, big_vision_case["text_logits"], rtol=0, atol=4.2e-5)


def test_losses_equal_big_vision(loss_and_gradients, batch, big_vision_case):
    loss, _ = loss_and_gradients(batch["mask_loss"])
    np.testing.assert_allclose(loss, big_vision_case["loss"], rtol=0, atol=2e-6)
    for row, expected in enumerate(big_vision_case["loss_per_example"]):
        loss, _ = loss_and_gradients(batch["mask_loss"] * (jnp.arange(3) == row)[:, None])
        np.testing.assert_allclose(loss, expected, rtol=0, atol=2e-6)


def their_layout(gradients):
    """Returns our gradients under big_vision's names, with parts joined, by the table's inverse."""
    out = {}
    for row in big_vision.rows():
        array = np.asarray(gradients[row.ours])
        array = np.stack([row.write(layer) for layer in array]) if "/layers/" in row.ours else row.write(array)
        if row.part is None:
            out[row.theirs] = array
        else:
            out.setdefault(row.theirs, {})[row.part] = array
    return {k: np.stack([v[0], v[1]], axis=1) if isinstance(v, dict) else v for k, v in out.items()}


def test_gradients_of_all_parameters_equal_big_vision(loss_and_gradients, batch, big_vision_case, stored):
    gradients = their_layout(loss_and_gradients(batch["mask_loss"])[1])
    norms = {k.removeprefix("grad_l2/"): v for k, v in big_vision_case.items() if k.startswith("grad_l2/")}
    assert set(norms) == set(gradients) == set(stored)
    for name, expected in norms.items():
        # A shift of all keys does not change softmax: the exact gradient of a key bias is 0.
        tolerance = dict(rtol=0, atol=1e-6) if name.endswith("key/bias") else dict(rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(gradients[name]), expected, **tolerance, err_msg=name)
    full = {k.removeprefix("grad/"): v for k, v in big_vision_case.items() if k.startswith("grad/")}
    assert len(full) == 6
    for name, expected in full.items():
        np.testing.assert_allclose(gradients[name].reshape(expected.shape), expected, rtol=0, atol=6e-6, err_msg=name)


def test_attention_mask_of_training_and_of_decoding_equal_big_vision(big_vision_case, big_vision_model):
    patches = big_vision_model.config.vision.num_patches
    text = {name: jnp.asarray(big_vision_case[name]) for name in ("mask_ar", "dec_mask_ar", "dec_mask_input")}
    mask_ar = text["mask_ar"][:, :-1]
    training = prefix_mask(*join_masks(patches, jnp.ones(mask_ar.shape, bool), mask_ar))
    decoding = prefix_mask(*join_masks(patches, text["dec_mask_input"], text["dec_mask_ar"]))
    np.testing.assert_array_equal(training, big_vision_case["attn_mask"])
    np.testing.assert_array_equal(decoding, big_vision_case["dec_prefill_attn_mask"])


def test_sizes_are_read_from_the_shapes(big_vision_model):
    vision, decoder = big_vision_model.config.vision, big_vision_model.config.decoder
    assert (vision.image_size, vision.patch_size, vision.width, vision.depth) == (28, 7, 48, 3)
    assert (vision.mlp_dim, vision.num_heads) == (80, 4)
    assert (decoder.vocab_size, decoder.width, decoder.depth, decoder.mlp_dim) == (192, 64, 2, 160)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 1, 24)
    assert not decoder.post_norms and decoder.final_softcap is None
    assert big_vision_model.config.preprocessing.source == "big_vision"
    assert big_vision_model.config.preprocessing.size == 28
    assert sum(array.size for array in param_tree.flatten(big_vision_model).values()) == 168_096


# Odd but valid files.


def assert_same_parameters(model, expected):
    ours, theirs = param_tree.flatten(model), param_tree.flatten(expected)
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


def test_reads_names_without_the_params_prefix(tmp_path, stored, big_vision_model):
    np.savez(tmp_path / "bare.npz", **stored)
    assert_same_parameters(load(tmp_path / "bare.npz"), big_vision_model)


def test_reads_only_the_parameters_of_a_whole_train_state(tmp_path, stored, big_vision_model):
    state = {f"params/{name}": array for name, array in stored.items()} | {"opt/0/mu": np.zeros(3)}
    np.savez(tmp_path / "state.npz", **state)
    assert_same_parameters(load(tmp_path / "state.npz"), big_vision_model)


def test_reads_vision_blocks_stored_one_by_one(tmp_path, stored, big_vision_model):
    unrolled = {}
    for name, array in stored.items():
        if name.startswith(f"{BLOCK}/"):
            leaf = name.removeprefix(f"{BLOCK}/")
            unrolled.update({f"{BLOCK}_{i}/{leaf}": layer for i, layer in enumerate(array)})
        else:
            unrolled[name] = array
    np.savez(tmp_path / "unrolled.npz", **unrolled)
    assert_same_parameters(load(tmp_path / "unrolled.npz"), big_vision_model)


def test_reads_bfloat16_that_numpy_stored_as_void(tmp_path, stored):
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in stored.items()}
    np.savez(tmp_path / "bf16.npz", **rounded)
    assert np.load(tmp_path / "bf16.npz")["img/head/bias"].dtype == np.dtype("V2")
    model = load(tmp_path / "bf16.npz")
    np.testing.assert_array_equal(
        param_tree.flatten(model)["projector/linear/kernel"], rounded["img/head/kernel"].astype(np.float32)
    )
    kept = load(tmp_path / "bf16.npz", "bfloat16")
    assert {array.dtype for array in param_tree.flatten(kept).values()} == {jnp.dtype("bfloat16")}


def test_reads_gemma_2_norms_and_takes_its_caps_as_arguments(tmp_path, stored):
    width = stored["llm/final_norm/scale"].shape[0]
    norms = {
        f"llm/layers/{n}/scale": np.full((2, width), 0.25, np.float32) for n in ("post_attention_norm", "post_ffw_norm")
    }
    np.savez(tmp_path / "gemma2.npz", **stored, **norms)
    model = load(tmp_path / "gemma2.npz", attn_softcap=50.0, final_softcap=30.0)
    assert model.config.decoder.post_norms
    assert (model.config.decoder.attn_softcap, model.config.decoder.final_softcap) == (50.0, 30.0)
    np.testing.assert_array_equal(model.decoder.layers.post_ffw_norm.scale[...], 0.25)


# Broken files: one sentence each.


def refused(path, match):
    with pytest.raises(UserError, match=match) as info:
        load(path)
    assert "\n" not in str(info.value)


def test_lists_missing_and_unused_arrays(tmp_path, stored):
    changed = dict(stored)
    changed["llm/final_norm/weight"] = changed.pop("llm/final_norm/scale")
    np.savez(tmp_path / "renamed.npz", **changed)
    refused(tmp_path / "renamed.npz", "missing llm/final_norm/scale; not used llm/final_norm/weight")


def test_counts_the_names_that_a_long_list_omits(tmp_path, stored):
    np.savez(tmp_path / "extra.npz", **stored, **{f"extra_{i}": np.zeros(1) for i in range(11)})
    refused(tmp_path / "extra.npz", "missing nothing; not used extra_0, .* and 3 more")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("img/head/kernel", (48, 63)),
        ("img/head/kernel", (64, 48)),  # as many numbers, other axes
        ("llm/layers/mlp/gating_einsum", (2, 2, 160, 64)),
        ("llm/layers/attn/attn_vec_einsum/w", (2, 24, 4, 64)),
        ("llm/layers/pre_ffw_norm/scale", (1, 128)),
    ],
)
def test_refuses_arrays_of_other_shapes(tmp_path, stored, name, shape):
    np.savez(tmp_path / "shape.npz", **stored | {name: np.zeros(shape, np.float32)})
    refused(tmp_path / "shape.npz", name)


def test_refuses_a_truncated_file(tmp_path, golden):
    data = (golden / "bigvision_paligemma/params.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.npz", "cut.npz cannot be read as npz .*download it again")


def test_refuses_a_file_damaged_in_the_middle(tmp_path, golden):
    data = bytearray((golden / "bigvision_paligemma/params.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(bytes(data))
    refused(tmp_path / "damaged.npz", "cannot be read")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x93NUMPY\x01\x00"])
def test_refuses_a_file_that_is_not_an_archive(tmp_path, content):
    (tmp_path / "other.npz").write_bytes(content)
    refused(tmp_path / "other.npz", "other.npz cannot be read as npz")


def test_refuses_a_single_array(tmp_path):
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused(tmp_path / "array.npz", "array.npz cannot be read as npz")


class Bomb:
    """Unpickling this would raise something else than UserError."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_never_unpickles(tmp_path, stored):
    np.savez(tmp_path / "objects.npz", **stored | {"img/head/bias": np.array([Bomb()], dtype=object)})
    refused(tmp_path / "objects.npz", "img/head/bias cannot be read")
    with (tmp_path / "pickled.npz").open("wb") as file:
        np.save(file, np.array([Bomb()], dtype=object))
    refused(tmp_path / "pickled.npz", "pickled.npz cannot be read as npz")


def test_names_the_arrays_that_another_models_file_lacks(tmp_path):
    np.savez(tmp_path / "mlp.npz", kernel=np.zeros((2, 2)))
    refused(tmp_path / "mlp.npz", "has no array .*: it is not a PaliGemma or SigLIP of big_vision")
