"""PaliGemma as a whole: sizes at 3B, dependence of logits on inputs, invariances, intermediates, and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models.paligemma import PaliGemma, join_masks, positions_of, variant
from paligemma_jax.tasks.common import SHARDING_RULES
from train_jax.core import param_tree
from train_jax.parallel import sharding

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def forward(small_model):
    """Logits and intermediates of the small model, jitted."""
    graph, arrays = param_tree.split(small_model)
    jitted = jax.jit(lambda arrays, batch: param_tree.merge(graph, arrays)(**batch))
    return lambda **batch: jitted(arrays, batch)


@pytest.fixture(scope="module")
def logits(forward, small_batch):
    return np.asarray(forward(**small_batch)[0])


# Sizes.


def counts(config):
    """Number of parameters per tower, without allocating them."""
    model = nnx.eval_shape(lambda: PaliGemma(config, rngs=nnx.Rngs(0)))
    towers = {}
    for path, leaf in param_tree.abstract(model).items():
        towers[path.split("/")[0]] = towers.get(path.split("/")[0], 0) + leaf.size
    return towers


def test_parameters_of_the_released_model():
    assert counts(variant("3b-224")) == {"decoder": 2_508_531_712, "vision": 412_442_352, "projector": 2_361_344}


def test_parameters_of_the_padded_vocabulary():
    padded = variant("3b-224").replace(decoder=dict(vocab_size=257_216))
    assert counts(padded)["decoder"] == 2_508_531_712 + 64 * 2048


# Gemma 2's own parameter counts as released (vocabulary 256,000), without PaliGemma's 1,152 tokens.
GEMMA_2_SIZES = {"pg2-3b": 2_614_341_888, "pg2-10b": 9_241_705_984, "pg2-28b": 27_227_128_320}


@pytest.mark.parametrize("name", GEMMA_2_SIZES)
def test_parameters_of_paligemma_2(name):
    config = variant(f"{name}-448")
    width = config.decoder.width
    towers = counts(config)
    assert towers["decoder"] == GEMMA_2_SIZES[name] + 1152 * width
    assert towers["vision"] == 412_442_352 + (1024 - 256) * 1152
    assert towers["projector"] == (1152 + 1) * width
    assert config.vision.image_size == 448


def test_sizes_of_paligemma_2_differ_in():
    scales = {name: variant(f"{name}-224").decoder.query_scale for name in GEMMA_2_SIZES}
    assert scales == {"pg2-3b": None, "pg2-10b": None, "pg2-28b": 1 / 12}
    for name in GEMMA_2_SIZES:
        decoder = variant(f"{name}-224").decoder
        assert (decoder.attn_softcap, decoder.final_softcap, decoder.sliding_window) == (50.0, None, 4096)


@pytest.mark.parametrize("size, patches", [(224, 256), (448, 1024), (896, 4096)])
def test_other_resolutions_add_positions_alone(size, patches):
    config = variant(f"3b-{size}")
    assert config.vision.num_patches == patches
    assert counts(config)["vision"] == 412_442_352 + (patches - 256) * 1152


def test_an_unknown_variant_is_refused():
    for name in ("3b-225", "pg2-27b-224", "3b", "", "-224"):
        with pytest.raises(ValueError, match=f"variant '{name}' is unknown, expected 'tiny', or one of 3b, pg2-3b"):
            variant(name)


def test_replace_changes_one_tower_or_both():
    config = variant("tiny").replace(vision=dict(depth=1), decoder=dict(depth=2), both=dict(dtype="bfloat16"))
    assert (config.vision.depth, config.decoder.depth) == (1, 2)
    assert config.vision.dtype == config.decoder.dtype == "bfloat16"
    assert config.replace(vision=dict(depth=4), decoder=dict(depth=5), both=dict(dtype="float32")) == variant("tiny")


# Dependence of logits on inputs. The rows have 3, 5, 2 prefix and 2, 1, 3 suffix tokens.


def changed_positions(forward, batch, logits, row, **changes):
    """Real text positions of one row whose logits differ after a change; other rows must stay bit-identical."""
    after = np.asarray(forward(**batch | changes)[0])
    others = [r for r in range(3) if r != row]
    np.testing.assert_array_equal(after[others], logits[others])
    return np.flatnonzero((np.abs(after[row] - logits[row]).max(-1) > 1e-6) & np.asarray(batch["mask_input"][row]))


def test_a_suffix_token_changes_itself_and_what_follows(forward, small_batch, logits):
    tokens = small_batch["tokens"]
    for position in (2, 3, 4):  # the suffix of row 2
        changed = changed_positions(
            forward, small_batch, logits, 2, tokens=tokens.at[2, position].set((tokens[2, position] + 1) % 64)
        )
        np.testing.assert_array_equal(changed, np.arange(position, 5))


def test_a_prefix_token_changes_the_whole_row(forward, small_batch, logits):
    tokens = small_batch["tokens"]
    changed = changed_positions(forward, small_batch, logits, 1, tokens=tokens.at[1, 4].set((tokens[1, 4] + 1) % 64))
    np.testing.assert_array_equal(changed, np.arange(6))  # earlier prefix tokens included


def test_the_image_changes_the_whole_row(forward, small_batch, logits):
    images = small_batch["images"].at[0].set(-small_batch["images"][0])
    np.testing.assert_array_equal(changed_positions(forward, small_batch, logits, 0, images=images), np.arange(5))


def test_a_padding_token_changes_no_real_position(forward, small_batch, logits):
    tokens = small_batch["tokens"].at[0, 6].set(33)
    assert not len(changed_positions(forward, small_batch, logits, 0, tokens=tokens))


def test_without_a_causal_suffix_the_answer_would_leak(forward, small_batch, logits):
    """Checks the leak test: with mask_ar 0 on the suffix, earlier positions attend to it."""
    batch = small_batch | dict(mask_ar=jnp.zeros_like(small_batch["mask_ar"]))
    open_logits = np.asarray(forward(**batch)[0])
    tokens = small_batch["tokens"].at[2, 4].set((small_batch["tokens"][2, 4] + 1) % 64)
    assert 0 in changed_positions(forward, batch, open_logits, 2, tokens=tokens)


# Invariances.


def place(batch, length, offsets):
    """The rows of a batch at other offsets in a longer, padded text; prefix padding has mask_ar 0, suffix padding 1."""
    rows, width = batch["tokens"].shape
    tokens, mask_ar, mask_input = (np.zeros((rows, length), np.int32) for _ in range(3))
    for row, offset in enumerate(offsets):
        real = int(batch["mask_input"][row].sum())
        for name, out in (("tokens", tokens), ("mask_ar", mask_ar), ("mask_input", mask_input)):
            out[row, offset : offset + real] = batch[name][row, :real]
        mask_ar[row, offset + real :] = 1
    return dict(
        images=batch["images"],
        tokens=jnp.asarray(tokens),
        mask_ar=jnp.asarray(mask_ar),
        mask_input=jnp.asarray(mask_input, bool),
    )


@pytest.mark.parametrize("offsets", [(0, 0, 0), (5, 2, 4), (8, 7, 8)], ids=["right", "both sides", "left"])
def test_padding_on_either_side_changes_nothing(forward, small_batch, logits, offsets):
    out = np.asarray(forward(**place(small_batch, 13, offsets))[0])
    for row, offset in enumerate(offsets):
        real = int(small_batch["mask_input"][row].sum())
        np.testing.assert_allclose(out[row, offset : offset + real], logits[row, :real], rtol=0, atol=1e-5)


def test_a_missing_input_mask_means_that_all_tokens_are_real(forward, small_batch):
    batch = small_batch | dict(mask_input=jnp.ones((3, 8), bool))
    expected, _ = forward(**batch)
    np.testing.assert_array_equal(forward(**batch | dict(mask_input=None))[0], expected)


def test_rows_do_not_depend_on_other_rows(forward, small_batch, logits):
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in small_batch.items()}
        real = np.asarray(alone["mask_input"][0])
        np.testing.assert_allclose(forward(**alone)[0][0][real], logits[row][real], rtol=0, atol=1e-5)
    reversed_logits, _ = forward(**{name: array[::-1] for name, array in small_batch.items()})
    real = np.asarray(small_batch["mask_input"])
    np.testing.assert_allclose(np.asarray(reversed_logits)[::-1][real], logits[real], rtol=0, atol=1e-5)


def test_positions_count_real_tokens():
    valid = jnp.asarray([[True, True, False, True], [False, False, True, True]])
    np.testing.assert_array_equal(positions_of(valid), [[0, 1, 1, 2], [0, 0, 0, 1]])


def test_join_masks_puts_a_real_bidirectional_image_in_front():
    valid, causal = join_masks(2, jnp.asarray([[1, 0]]), jnp.asarray([[0, 1]]))
    np.testing.assert_array_equal(valid, [[True, True, True, False]])
    np.testing.assert_array_equal(causal, [[0, 0, 0, 1]])


# Intermediates and parts.


def test_intermediates_have_their_names_and_shapes(forward, small_batch):
    logits, out = forward(**small_batch)
    patches, text, E, D = 9, 8, 16, 32
    assert {name: array.shape for name, array in out.items()} == {
        "vision/patches": (3, patches, E),
        "vision/embedded": (3, patches, E),
        "vision/blocks": (3, patches, E),
        "vision/encoded": (3, patches, E),
        "image_features": (3, patches, D),
        "embedded": (3, text, D),
        "encoded": (3, patches + text, D),
        "hidden": (3, text, D),
    }
    assert logits.shape == (3, text, 64)
    assert {array.dtype for array in [logits, *out.values()]} == {jnp.dtype("float32")}


def test_logits_are_hidden_states_times_the_tied_embedding(forward, small_model, small_batch):
    logits, out = forward(**small_batch)
    table = small_model.decoder.embed_tokens.embedding[...]
    np.testing.assert_allclose(logits, out["hidden"] @ table.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(out["embedded"], table[small_batch["tokens"]] * 32**0.5, rtol=1e-6)


# Sharding.


def bytes_per_device(arrays, fsdp, tensor):
    """By hand: block kernels and the embedding are cut by both axes, the projector by fsdp, all else is whole."""
    total = 0
    for path, array in arrays.items():
        if ("/layers/" in path and path.endswith("kernel")) or path == "decoder/embed_tokens/embedding":
            parts = fsdp * tensor
        else:
            parts = fsdp if path == "projector/linear/kernel" else 1
        total += array.nbytes // parts
    return total


@pytest.mark.parametrize("data, fsdp, tensor", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_sharded_forward_equals_one_device(small_model, small_batch, data, fsdp, tensor):
    graph, arrays = param_tree.split(small_model)
    batch = {name: jnp.concatenate([array] * 3)[:8] for name, array in small_batch.items()}

    def run(arrays, batch):
        return param_tree.merge(graph, arrays)(**batch)[0]

    expected = jax.jit(run)(arrays, batch)
    mesh = sharding.make_mesh(dict(data=data, fsdp=fsdp, tensor=tensor))
    where, notes = sharding.shardings(mesh, SHARDING_RULES, arrays)
    assert not notes
    placed = {path: jax.device_put(array, where[path]) for path, array in arrays.items()}
    for device in mesh.devices.flat:
        held = [s.data.nbytes for a in placed.values() for s in a.addressable_shards if s.device == device]
        assert sum(held) == bytes_per_device(arrays, fsdp, tensor)
    rows = sharding.batch_sharding(mesh, accumulate=False)
    out = jax.jit(run, out_shardings=rows)(placed, jax.device_put(batch, rows))
    assert out.addressable_shards[0].data.shape[0] == 8 // (data * fsdp)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
