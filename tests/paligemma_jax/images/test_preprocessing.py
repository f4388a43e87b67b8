import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.records import BadRow
from paligemma_jax.images.preprocessing import CLIP_MEAN, CLIP_STD, HALF, Preprocessing, decode
from train_jax.core.errors import UserError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


# Decoding.


def test_rgb_png_comes_back_exactly():
    np.testing.assert_array_equal(decode(encoded(NOISE)), NOISE)


def test_alpha_is_dropped_whatever_its_value():
    alpha = RNG.integers(0, 256, (20, 30, 1), np.uint8)
    np.testing.assert_array_equal(decode(encoded(np.concatenate([NOISE, alpha], -1))), NOISE)


def test_grey_and_palette_are_expanded():
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(decode(encoded(grey)), np.stack([grey] * 3, -1))
    palette = Image.fromarray(grey, "L").convert("P")
    np.testing.assert_array_equal(decode(encoded(palette)), np.array(palette.convert("RGB")))


def test_sixteen_bits_keep_the_high_byte():
    deep = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(deep))[..., 0], [[0, 0, 1, 0x12, 0xFF]])


def test_cmyk_jpeg_is_converted():
    white, red = Image.new("CMYK", (8, 8), (0, 0, 0, 0)), Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode(encoded(white, "JPEG")).min() >= 250
    assert np.abs(decode(encoded(red, "JPEG")).astype(int) - [255, 0, 0]).max() <= 8


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    stored = encoded(NOISE, exif=exif.tobytes())
    np.testing.assert_array_equal(decode(stored), np.rot90(NOISE, -1))


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(NOISE)[:200], encoded(NOISE, "JPEG")[:300], encoded(NOISE)[:60] + bytes(500)],
    ids=["empty", "text", "cut png", "cut jpeg", "zeroed png"],
)  # fmt: skip
def test_corrupt_bytes_are_a_bad_row(data):
    with pytest.raises(BadRow, match="cannot decode the image .*; replace the file") as caught:
        decode(data)
    assert "object at 0x" not in str(caught.value)


def test_floating_point_image_is_a_bad_row():
    with pytest.raises(BadRow, match="floating-point"):
        decode(encoded(np.ones((3, 3), np.float32), "TIFF"))


# Resizing and value range, family by family.


def test_equal_size_changes_nothing():
    square = NOISE[:20, :20]
    for preprocessing in (
        Preprocessing.big_vision(20),
        Preprocessing.big_vision(20, antialias=True),
        Preprocessing.siglip(20),
        Preprocessing.clip(20),
    ):
        np.testing.assert_array_equal(preprocessing.resize(square), square)


def test_big_vision_truncates_instead_of_rounding():
    image = np.zeros((1, 2, 3), np.uint8)
    image[:, 1] = 3
    # Columns at 0.25 and 0.75 between 0 and 3 when going from 2 to 4 pixels: 0.75 and 2.25.
    assert Preprocessing.big_vision(4).resize(image)[0, :, 0].tolist() == [0, 0, 2, 3]


def test_siglip_is_pil_bicubic_on_uint8_then_half_mean_and_deviation():
    preprocessing = Preprocessing.siglip(8)
    expected = np.array(Image.fromarray(NOISE).resize((8, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocessing.resize(NOISE), expected)
    np.testing.assert_allclose(preprocessing.apply(NOISE), expected / 127.5 - 1, atol=2e-7)


@pytest.mark.parametrize("shape", [(20, 30), (31, 17), (24, 24), (9, 40)])
def test_clip_resizes_the_short_side_and_crops_the_centre(shape):
    image = RNG.integers(0, 256, (*shape, 3), np.uint8)
    size, (height, width) = 8, shape
    new = (8, int(8 * width / height)) if height <= width else (int(8 * height / width), 8)
    full = np.array(Image.fromarray(image).resize(new[::-1], Image.Resampling.BICUBIC))
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    crop = full[top : top + size, left : left + size]
    preprocessing = Preprocessing.clip(size)
    np.testing.assert_array_equal(preprocessing.resize(image), crop)
    np.testing.assert_allclose(preprocessing.apply(image), (crop / 255 - CLIP_MEAN) / CLIP_STD, atol=1e-6)


def test_value_range_ends_at_exactly_plus_and_minus_one():
    ends = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    out = Preprocessing.big_vision(2).normalize(ends)
    assert out.dtype == np.float32 and out.min() == -1 and out.max() == 1


def test_normalize_is_the_same_on_the_device_and_over_batches():
    preprocessing = Preprocessing.clip(8)
    batch = np.stack([NOISE, NOISE[::-1]])
    on_host = preprocessing.normalize(batch)
    assert isinstance(on_host, np.ndarray)
    on_device = jax.jit(preprocessing.normalize)(jnp.asarray(batch))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, on_host, atol=1e-6)
    np.testing.assert_array_equal(on_host[0], preprocessing.normalize(NOISE))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 200)])
def test_extreme_shapes_give_a_square(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    for preprocessing in (Preprocessing.big_vision(8), Preprocessing.siglip(8), Preprocessing.clip(8)):
        out = preprocessing.resize(image)
        assert out.shape == (8, 8, 3) and out.dtype == np.uint8 and (out == 77).all()


# Round trips.

ALL = [
    Preprocessing.big_vision(224),
    Preprocessing.big_vision(64, antialias=True),
    Preprocessing.siglip(448),
    Preprocessing.clip(224),
]


@pytest.mark.parametrize("preprocessing", ALL)
def test_dict_round_trip_survives_json(preprocessing):
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize("preprocessing", ALL[2:])
def test_hugging_face_round_trip(preprocessing):
    config = json.loads(json.dumps(preprocessing.to_hugging_face()))
    assert Preprocessing.from_hugging_face(config) == preprocessing


def test_reads_the_published_configurations():
    paligemma = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor", "image_seq_length": 256,
        "image_std": [0.5, 0.5, 0.5], "processor_class": "PaliGemmaProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
    }  # fmt: skip
    assert Preprocessing.from_hugging_face(paligemma) == Preprocessing.siglip(224)
    clip = {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
        "resample": 3, "size": 224,
    }  # fmt: skip
    assert Preprocessing.from_hugging_face(clip) == Preprocessing.clip(224)


@pytest.mark.parametrize(
    "change",
    [{"size": {"height": 224, "width": 200}}, {"size": {"longest_edge": 224}}, {"resample": 5}, {"rescale_factor": 1.0},
     {"do_normalize": False}, {"do_center_crop": True, "crop_size": {"height": 200, "width": 224}}],
)  # fmt: skip
def test_other_image_processors_are_refused(change):
    with pytest.raises(UserError, match="expected"):
        Preprocessing.from_hugging_face(Preprocessing.siglip(224).to_hugging_face() | change)


@pytest.mark.parametrize(
    "fields",
    [{"size": 0}, {"method": "bicubic"}, {"source": "transformers"}, {"crop": True}, {"mean": (0.5,)},
     {"std": (0.5, 0.0, 0.5)}],
)  # fmt: skip
def test_combinations_that_no_family_has_are_refused(fields):
    with pytest.raises(UserError, match="expected"):
        Preprocessing(**({"size": 8} | fields))


def test_unknown_fields_of_a_stored_dict_are_refused():
    with pytest.raises(UserError, match="kernel"):
        Preprocessing.from_dict({"size": 8, "kernel": "bilinear"})
    assert Preprocessing.from_dict({"size": 8}).mean == HALF
