"""The vision tower: positions resampled as scipy, torch and transformers do; sin-cos; order of patches; image size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx
from safetensors.numpy import load_file

from paligemma_jax.models.vit import ViT, ViTConfig, resample_positions, sincos_2d
from train_jax.core import param_tree

pytestmark = pytest.mark.usefixtures("fast_compilation")


def table(grid, width=3, seed=0):
    return np.random.default_rng(seed).standard_normal((grid**2, width)).astype(np.float32)


@pytest.mark.parametrize("old, new", [(4, 6), (4, 3), (16, 32)])
def test_bilinear_is_big_visions_zoom(old, new):
    """big_vision (models/vit.py, resample_posemb) zooms the grid with scipy at order 1."""
    positions = table(old)
    expected = scipy.ndimage.zoom(positions.reshape(old, old, 3), (new / old, new / old, 1), order=1)
    np.testing.assert_array_equal(resample_positions(positions, new, "bilinear"), expected.reshape(new**2, 3))


def test_bilinear_keeps_the_corners():
    """Corners aligned: sample i of n lies at i (old - 1) / (new - 1)."""
    ramp = np.repeat(np.arange(3, dtype=np.float32)[None], 3, 0).reshape(9, 1)  # the value is the column
    out = resample_positions(ramp, 5, "bilinear").reshape(5, 5)
    np.testing.assert_allclose(out, np.tile([0, 0.5, 1, 1.5, 2], (5, 1)), atol=1e-6)


def test_bicubic_2_to_4_by_hand():
    """Keys' kernel, a = -0.75, half-pixel centres: the four outputs lie at -0.25, 0.25, 0.75 and 1.25 of [0, 1].

    Distances of the taps are 1.25, 0.25, 0.75, 1.75; their weights w = f(1.25), f(0.25), f(0.75), f(1.75) with
    f(d) = (a + 2) d^3 - (a + 3) d^2 + 1 inside 1 and a d^3 - 5 a d^2 + 8 a d - 4 a up to 2. Taps outside clamp.
    """
    f_125, f_025, f_075, f_175 = -0.10546875, 0.87890625, 0.26171875, -0.03515625
    inner = np.array([f_125 + f_025, f_075 + f_175])  # at 0.25: taps -1, 0 clamp to 0, taps 1, 2 to 1
    outer = np.array([f_175 + f_075 + f_025, f_125])  # at -0.25: taps -2, -1, 0 clamp to 0, tap 1
    weights = np.stack([outer, inner, inner[::-1], outer[::-1]])
    positions = np.array([[1.0], [2.0], [5.0], [-3.0]], np.float32)
    expected = weights @ positions.reshape(2, 2) @ weights.T
    np.testing.assert_allclose(resample_positions(positions, 4, "bicubic").reshape(4, 4), expected, atol=1e-6)


@pytest.mark.parametrize("old, new", [(4, 6), (6, 4), (16, 32), (2, 3)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_a_constant_table_stays_constant(old, new, method):
    positions = np.full((old**2, 2), 1.5, np.float32)
    out = resample_positions(positions, new, method)
    assert out.dtype == np.float32 and out.shape == (new**2, 2)
    np.testing.assert_allclose(out, 1.5, atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_rows_and_columns_are_not_mixed_up(method):
    positions = table(4)
    transposed = positions.reshape(4, 4, 3).transpose(1, 0, 2).reshape(16, 3)
    out = resample_positions(positions, 6, method).reshape(6, 6, 3).transpose(1, 0, 2).reshape(36, 3)
    np.testing.assert_allclose(resample_positions(transposed, 6, method), out, atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_an_equal_grid_is_the_identity(method):
    positions = table(5)
    np.testing.assert_array_equal(resample_positions(positions, 5, method), positions)


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="'lanczos' is unknown, expected 'bilinear' or 'bicubic'"):
        resample_positions(table(4), 6, "lanczos")


# The golden of a SigLIP tower on larger images, the one stored result of torch's bicubic resampling.


def siglip_tower(stored, grid, size):
    """Our tower with the golden's weights, its positions resampled to `grid`."""
    config = ViTConfig(image_size=size, patch_size=8, **siglip_sizes(stored))
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    arrays = {}
    for path, leaf in param_tree.abstract(model).items():
        name = "vision_model." + path.replace("/", ".").replace("layers.", "encoder.layers.{i}.")
        name = name.replace("patch_embedding", "embeddings.patch_embedding")
        name = name.replace(".kernel", ".weight").replace(".scale", ".weight")
        if path == "position_embedding":
            arrays[path] = resample_positions(stored[f"vision_model.embeddings.{path}.weight"], grid, "bicubic")
            continue
        layers = range(leaf.shape[0]) if "{i}" in name else [0]
        weights = [stored[name.format(i=i)] for i in layers]
        if path == "patch_embedding/kernel":
            weights = [weights[0].transpose(2, 3, 1, 0)]
        elif path.endswith("kernel"):
            weights = [weight.T for weight in weights]
        arrays[path] = np.stack(weights).reshape(leaf.shape)
    return param_tree.assign(model, {path: jnp.asarray(array) for path, array in arrays.items()})


def siglip_sizes(stored):
    names = {name.split(".")[3] for name in stored if name.startswith("vision_model.encoder.layers.")}
    mlp, width = stored["vision_model.encoder.layers.0.mlp.fc1.weight"].shape
    return dict(width=width, depth=len(names), mlp_dim=mlp, num_heads=4)


def pooled(stored, x):
    """SigLIP's attention-pooling head in numpy: a probe reads all patches, then a residual MLP."""
    head = {name.removeprefix("vision_model.head."): a for name, a in stored.items() if ".head." in name}
    q_weight, k_weight, v_weight = np.split(head["attention.in_proj_weight"], 3)
    q_bias, k_bias, v_bias = np.split(head["attention.in_proj_bias"], 3)
    split = lambda y: y.reshape(*y.shape[:-1], 4, -1)  # noqa: E731
    q = split(head["probe"][0] @ q_weight.T + q_bias)
    k, v = split(x @ k_weight.T + k_bias), split(x @ v_weight.T + v_bias)
    weights = jax.nn.softmax(np.einsum("qnh,bpnh->bnqp", q, k) * q.shape[-1] ** -0.5, axis=-1)
    x = np.einsum("bnqp,bpnh->bqnh", weights, v).reshape(len(x), 1, -1)[:, 0]
    x = x @ head["attention.out_proj.weight"].T + head["attention.out_proj.bias"]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = y * head["layernorm.weight"] + head["layernorm.bias"]
    y = np.asarray(jax.nn.gelu(y @ head["mlp.fc1.weight"].T + head["mlp.fc1.bias"], approximate=True))
    x = x + y @ head["mlp.fc2.weight"].T + head["mlp.fc2.bias"]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "size, images, embeds, atol",
    [(32, "pixel_values", "image_embeds", 2e-5), (48, "hires_pixel_values", "hires_image_embeds", 1e-4)],
    ids=["as trained", "larger"],
)
def test_siglip_on_larger_images_equals_transformers(golden, size, images, embeds, atol):
    stored = load_file(golden / "hf_siglip/model.safetensors")
    case = np.load(golden / "hf_siglip/case.npz")
    model = siglip_tower(stored, size // 8, size)
    graph, arrays = param_tree.split(model)
    pixels = jnp.asarray(case[images].transpose(0, 2, 3, 1))
    hidden, _ = jax.jit(lambda arrays: param_tree.merge(graph, arrays)(pixels))(arrays)
    np.testing.assert_allclose(pooled(stored, np.asarray(hidden)), case[embeds], rtol=0, atol=atol)


# The tower itself.


def test_sincos_positions_are_mocos():
    """x first, sine before cosine, frequencies 10000^(-k / (D/4 - 1))."""
    out = np.asarray(sincos_2d(3, 16)).reshape(3, 3, 16)
    omega = 10_000.0 ** -(np.arange(4) / 3)
    for y in range(3):
        for x in range(3):
            expected = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
            np.testing.assert_allclose(out[y, x], np.concatenate(expected), atol=1e-6)


def test_posemb_chooses_the_initial_positions():
    config = dict(image_size=12, patch_size=4, width=16, depth=1, mlp_dim=8, num_heads=2)

    @jax.jit
    def positions():
        return ViT(ViTConfig(**config, posemb="sincos2d"), rngs=nnx.Rngs(0)).position_embedding[...]

    np.testing.assert_array_equal(positions(), sincos_2d(3, 16))
    with pytest.raises(ValueError, match="posemb is 'rope', expected 'learn' or 'sincos2d'"):
        ViT(ViTConfig(**config, posemb="rope"), rngs=nnx.Rngs(0))


def test_patches_are_in_row_major_order(small_model):
    """Changing pixels of one patch changes that patch's embedding alone: row 1, column 2 of 3 x 3 is patch 5."""
    images = np.zeros((2, 12, 12, 3), np.float32)
    images[1, 4:8, 8:12] = 1.0
    _, out = small_model.vision(jnp.asarray(images))
    changed = np.flatnonzero(np.abs(out["patches"][1] - out["patches"][0]).max(axis=1))
    np.testing.assert_array_equal(changed, [5])


def test_another_image_size_is_refused(small_model):
    with pytest.raises(
        ValueError, match=r"images are 16 x 16 pixels, but .* 12 x 12: resize them, or load .*image_size=16"
    ):
        small_model.vision(jnp.zeros((1, 16, 16, 3)))
