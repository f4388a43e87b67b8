"""The contrastive losses against plain matrices of all pairs and against goldens: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from paligemma_jax.losses import sigmoid_loss, softmax_loss
from tests.paligemma_jax.contrastive import make_batch, mesh_of, plain_sigmoid, plain_softmax
from train_jax.core.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

ALL = (0, 1, 2, 3)


def ours(zimg, ztxt, log_scale, bias, **options):
    """Both losses, one much larger than the other, so that one program and one cotangent other than 1 try both."""
    softmax = softmax_loss(zimg, ztxt, log_scale, **options)
    return jnp.stack([3 * sigmoid_loss(zimg, ztxt, log_scale, bias, **options), softmax])


def plain(*batch, **which):
    return jnp.stack([3 * plain_sigmoid(*batch, **which), plain_softmax(*batch, **which)])


def values_and_gradients(losses, batch, argnums=ALL):
    return losses(*batch), jax.jacrev(losses, argnums)(*batch)


def assert_equal(got, want, rtol=2e-5, atol=3e-6):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=atol), got, want)


def check(batch, mesh=None, axis="data", chunk_size=None, **which):
    @jax.jit
    def run(*batch):
        return values_and_gradients(
            lambda *batch: ours(*batch, mesh=mesh, axis=axis, chunk_size=chunk_size, **which), batch
        )

    assert_equal(run(*batch), values_and_gradients(lambda *batch: plain(*batch, **which), batch))


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])  # 16, 8, 4 or 2 texts of a device: 3 divides none of them
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_values_and_gradients_equal_the_plain_losses(devices, chunk_size):
    check(make_batch(), mesh_of(devices), chunk_size=chunk_size)


@pytest.mark.parametrize("shape, axis", [((2, 2, 2), ("data", "fsdp")), ((2, 2, 2), ("tensor", "data"))])
def test_ring_through_several_axes(shape, axis):
    check(make_batch(), mesh_of(*shape), axis, chunk_size=3)


def test_without_a_mesh():
    check(make_batch(13), chunk_size=4)


RNG = np.random.default_rng(1)
MASKS = {
    "mask": dict(mask=jnp.asarray(RNG.random((16, 32)) > 0.3)),
    "nothing": dict(mask=jnp.zeros((16, 32), bool)),
    "duplicates": dict(text_ids=jnp.asarray(RNG.integers(0, 12, 32), jnp.int32)),
    "same images": dict(image_ids=jnp.asarray(RNG.integers(0, 6, 16), jnp.int32)),
    "valid": dict(valid=jnp.asarray(RNG.random(16) > 0.3)),
    "all": dict(
        mask=jnp.asarray(RNG.random((16, 32)) > 0.5),
        text_ids=jnp.asarray(RNG.integers(0, 9, 32), jnp.int32),
        image_ids=jnp.asarray(RNG.integers(0, 6, 16), jnp.int32),
        valid=jnp.asarray(RNG.random(16) > 0.3),
    ),
}


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("devices", [1, 4])
def test_masks_with_two_texts_of_each_image(which, devices):
    check(make_batch(texts_of_each=2), mesh_of(devices), chunk_size=3, **MASKS[which])


def test_invalid_rows_do_not_count():
    zimg, ztxt, *scalars = make_batch(5)
    valid = jnp.asarray([True, False, True, True, False])
    some = jnp.flatnonzero(valid)
    got = 5 * ours(zimg, ztxt, *scalars, valid=valid)  # the mean is over all rows
    np.testing.assert_allclose(got, 3 * ours(zimg[some], ztxt[some], *scalars), rtol=1e-5)


def test_duplicate_texts_are_no_negatives():
    """Texts 0 and 2 are equal: only the pair of each with the other's image does not count."""
    batch = make_batch(3)
    mask = jnp.ones((3, 3), bool).at[0, 2].set(False).at[2, 0].set(False)
    np.testing.assert_allclose(ours(*batch, text_ids=jnp.asarray([7, 5, 7])), ours(*batch, mask=mask), rtol=1e-6)
    assert ours(*batch)[0] > ours(*batch, mask=mask)[0]


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (3,), (0, 3)])
def test_only_some_arguments_are_differentiated(argnums):
    batch, mesh = make_batch(), mesh_of(4)
    got = jax.jit(jax.jacrev(lambda *batch: ours(*batch, mesh=mesh, chunk_size=3), argnums))(*batch)
    assert_equal(got, jax.jacrev(plain, argnums)(*batch))


def test_a_locked_tower_costs_no_products():
    """Of the three products of a sigmoid step (logits, gradients of images and of texts) one is omitted."""
    batch = make_batch(chunk := 16)

    def products(argnums):
        loss = jax.grad(lambda *batch: sigmoid_loss(*batch, chunk_size=chunk), argnums)
        return str(jax.make_jaxpr(loss)(*batch)).count("dot_general")

    assert [products(argnums) for argnums in ((0, 1), (1,), (0,), (2,))] == [3, 2, 2, 1]


@pytest.mark.parametrize("dtype, rounding", [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_half_precision_embeddings_accumulate_in_float32(dtype, rounding):
    """Over 256 chunks: a sum in half precision would be off by much more than one rounding of the result."""
    batch = make_batch(256, width=32, dtype=dtype)
    got = jax.jit(lambda *batch: values_and_gradients(lambda *b: ours(*b, chunk_size=1), batch))(*batch)
    want = values_and_gradients(plain, [argument.astype(jnp.float32) for argument in batch])
    assert got[0].dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for one, other in zip(got[1][:2], want[1][:2], strict=True):
        assert one.dtype == dtype
        scale = np.abs(other).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(one.astype(jnp.float32) / scale, other / scale, atol=1.5 * rounding)
    np.testing.assert_allclose(got[1][2], want[1][2], rtol=1e-3)


def test_gradients_too_small_for_float16_are_kept_by_a_loss_scale():
    """At a logit of -10 a negative has a gradient of 5e-5 / B; the factor 2^15 follows the sums, before the cast."""
    zimg, ztxt, log_scale, _ = make_batch(64, dtype=jnp.float16)

    def scaled(loss):
        return jax.grad(lambda zimg: 2.0**15 * loss(zimg, ztxt, log_scale, jnp.float32(-12.0)))

    mask = ~jnp.eye(64, dtype=bool)  # negatives alone
    got = scaled(lambda *batch: sigmoid_loss(*batch, mask=mask))(zimg)
    want = scaled(lambda *batch: plain_sigmoid(*batch, mask=mask))(zimg.astype(jnp.float32))
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=5e-3, atol=2e-5)
    assert np.median(np.abs(want)) / 2**15 < jnp.finfo(jnp.float16).tiny  # without the scale most would lose bits


# ---- goldens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("prefix", ["", "emb_"])
def test_big_vision_golden(golden, prefix, devices):
    case = np.load(golden / "bigvision_siglip/case.npz")
    bias = "emb_b" if prefix else "b"
    names = [f"{prefix}zimg", f"{prefix}ztxt", f"{prefix}t_param", bias]
    batch = [jnp.asarray(case[name]) for name in names]  # scale and bias have shape [1], as checkpoints have them
    options = dict(mesh=mesh_of(devices), chunk_size=7)

    def check_one(name, loss, gradients, count):
        value, got = jax.value_and_grad(loss, tuple(range(count)))(*batch[:count])
        np.testing.assert_allclose(value, case[f"{prefix}{name}_loss"], rtol=2e-6)
        for gradient, key in zip(got, gradients, strict=True):
            np.testing.assert_allclose(gradient, case[f"{prefix}{name}_grad_{key}"], rtol=1e-5, atol=3e-6)

    check_one("sigmoid", lambda *a: sigmoid_loss(*a, **options), ("zimg", "ztxt", "t_param", "b"), 4)
    check_one("softmax", lambda *a: softmax_loss(*a, **options), ("zimg", "ztxt", "t_param"), 3)


def test_hugging_face_goldens(golden):
    def read(name):
        stored, case = load_file(golden / name / "model.safetensors"), np.load(golden / name / "case.npz")
        embeddings = [jnp.asarray(case[side]) for side in ("image_embeds", "text_embeds")]
        return (
            embeddings,
            [jnp.asarray(stored[key]) for key in ("logit_scale", "logit_bias") if key in stored],
            case["loss"],
        )

    embeddings, (log_scale, bias), expected = read("hf_siglip")
    np.testing.assert_allclose(sigmoid_loss(*embeddings, log_scale, bias, chunk_size=3), expected, rtol=2e-6)
    embeddings, (log_scale,), expected = read("hf_clip")
    np.testing.assert_allclose(softmax_loss(*embeddings, log_scale, chunk_size=3), expected, rtol=2e-6)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, options, sentence",
    [
        (7, {}, "7 texts of 6 images"),
        (0, {}, "0 texts of 6 images"),
        (6, dict(devices=4), "6 images on 4 devices"),
        (6, dict(chunk_size=0), "chunk_size=0, expected 1 or more"),
        (6, dict(devices=2, axis=("data", "model")), "axis model, expected some of data, fsdp, tensor"),
    ],
)
def test_user_errors(texts, options, sentence):
    devices = options.pop("devices", None)
    mesh = mesh_of(devices) if devices else None
    with pytest.raises(UserError, match=sentence):
        sigmoid_loss(jnp.ones((6, 2)), jnp.ones((texts, 2)), jnp.float32(0), jnp.float32(0), mesh=mesh, **options)
