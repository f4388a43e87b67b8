"""Image preprocessing of folders: both files' names, the defaults of a class, and refused values."""

import json

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.images.image_processor import CLIP_MEAN, CLIP_STD, HALF
from paligemma_jax.images.preprocessing import Preprocessing
from paligemma_jax.models.vit import ViTConfig
from paligemma_jax.weights.hugging_face.processor import read_preprocessing, write_preprocessing
from train_jax.core.errors import UserError

SIGLIP, CLIP = "SiglipImageProcessor", "CLIPImageProcessor"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}


@pytest.fixture
def read(tmp_path):
    """Writes the files and reads the preprocessing for a tower of 224 pixels."""

    def write_and_read(family=SIGLIP, preprocessor=None, processor=None, size=224):
        for name, values in (("preprocessor_config", preprocessor), ("processor_config", processor)):
            if values is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return read_preprocessing(tmp_path, family, ViTConfig(image_size=size))

    return write_and_read


def test_transformers_5_nests_it(read):
    """The file written by its processors' save_pretrained takes precedence over the older file."""
    assert read() is None
    assert read(preprocessor={}) == Preprocessing.siglip(224)
    nested = {"image_processor": IMAGENET | {"image_processor_type": SIGLIP}, "processor_class": "SiglipProcessor"}
    result = read(processor=nested)
    assert (result.mean, result.method, result.crop) == ((0.485, 0.456, 0.406), "bilinear", False)
    older = {"processor_class": "PaliGemmaProcessor", "image_seq_length": 256}  # of releases before
    assert read(processor=older) == Preprocessing.siglip(224)


@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_missing_keys_have_the_default_of_their_class(read, key, suffix):
    for family in (SIGLIP, CLIP):  # the class named in the file takes precedence over the model's family
        assert read(family, {key: CLIP + suffix}) == Preprocessing.clip(224)
        assert read(family, {key: SIGLIP + suffix}) == Preprocessing.siglip(224)
        assert read(family, {}) == (Preprocessing.siglip(224) if family == SIGLIP else Preprocessing.clip(224))
    result = read(CLIP, {"image_mean": [0.1, 0.2, 0.3], "image_std": None})
    assert (result.mean, result.std) == ((0.1, 0.2, 0.3), CLIP_STD)
    assert read(SIGLIP, {"image_std": 0.25}).std == (0.25,) * 3 and HALF == read(SIGLIP, {}).mean != CLIP_MEAN


def test_sizes_in_all_spellings(read):
    square = {"height": 336, "width": 336}
    for size, crop in ((336, 336), ({"shortest_edge": 336}, square), (336, square)):
        assert read(CLIP, {"size": size, "crop_size": crop}, size=336) == Preprocessing.clip(336)
    plain = read(CLIP, {"size": square, "crop_size": 336}, size=336)  # nothing is left to crop
    assert plain == read(CLIP, {"size": square, "do_center_crop": False}, size=336)
    assert not plain.crop and plain.size == 336
    assert plain == read(CLIP, {"size": 336, "crop_size": [336, 336], "default_to_square": True}, size=336)
    null = {"shortest_edge": None, "longest_edge": None}
    assert plain == read(CLIP, {"size": square | null, "crop_size": square | null}, size=336)
    assert read(SIGLIP, {"size": [336, 336], "crop_size": 8}, size=336) == Preprocessing.siglip(336)


PICTURE = np.random.default_rng(0).integers(0, 256, (150, 201, 3), np.uint8)
CROPPED = {  # transformers: the size that is resized to, and the left and upper edge of what is cut out
    "short": ({"size": {"shortest_edge": 256}}, (343, 256), 59, 16),
    "number": ({"size": 225, "crop_size": 224}, (301, 225), 38, 0),
    "square": ({"size": {"height": 256, "width": 256}}, (256, 256), 16, 16),
    "portrait": ({"size": {"shortest_edge": 256, "longest_edge": None}, "crop_size": [224, 224]}, (256, 343), 16, 59),
}


@pytest.mark.parametrize("name", CROPPED)
@pytest.mark.parametrize("family", [SIGLIP, CLIP])
def test_the_centre_is_cropped_after_resizing(read, tmp_path, family, name):
    values, size, left, top = CROPPED[name]
    picture = PICTURE.swapaxes(0, 1) if name == "portrait" else PICTURE
    result = read(family, {"do_center_crop": True, "crop_size": 224} | values)
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(result.resize(picture), resized[top : top + 224, left : left + 224])
    assert Preprocessing.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    write_preprocessing(tmp_path, result)
    assert read(family) == result
    assert result.at(448).resized == 2 * result.resized and result.at(448).at(224) == result


@pytest.mark.parametrize("factor", [0.00392157, 0.0039215686, 0.0039216, 0.003922, 0.00392])
def test_a_rounded_rescale_factor_is_used_as_given(read, factor):
    result = read(CLIP, {"rescale_factor": factor})
    expected = (np.arange(256) * factor - CLIP_MEAN[0]) / CLIP_STD[0]
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    np.testing.assert_allclose(result.normalize(pixels)[:, 0], expected, rtol=0, atol=2e-6)
    assert (result == Preprocessing.clip(224)) == (abs(factor * 255 - 1) < 1e-6)


@pytest.mark.parametrize(
    "family, values, sentence",
    [
        (SIGLIP, {"size": {"height": 96, "width": 96}}, "size = {'height': 96, .*expected the 224 pixels a side"),
        (SIGLIP, {"size": 224}, "size = 224, expected a height and a width"),  # transformers keeps the images' shape
        (SIGLIP, {"size": [224]}, r"size = \[224\], expected one square size"),
        (SIGLIP, {"size": {"height": [1], "width": None}}, "size = .*expected one square size"),
        (CLIP, {"size": {"shortest_edge": 224, "longest_edge": 448}}, "size = .*expected one square size"),
        (SIGLIP, {"size": {"height": 224, "width": 112}}, "size = "),
        (CLIP, {"size": 256, "crop_size": 257}, "crop_size = 257, expected one square size, at most the 256 pixels"),
        (CLIP, {"crop_size": {"shortest_edge": 224}}, "crop_size = {'shortest_edge': 224}, expected one square size"),
        (CLIP, {"crop_size": 192}, "crop_size = 192, expected the 224 pixels a side"),
        (SIGLIP, {"do_center_crop": True}, "crop_size = None, expected one square size"),
        (CLIP, {"do_center_crop": None}, "size = .*expected a height and a width where nothing is cropped"),
        (CLIP, {"do_center_crop": "true"}, "do_center_crop = 'true', expected true or false"),
        (CLIP, {"default_to_square": 1}, "default_to_square = 1, expected true or false"),
        (CLIP, {"do_resize": None}, "do_resize = None, expected True, as null switches the step off"),
        (SIGLIP, {"do_rescale": None}, "do_rescale = None, expected True"),
        (SIGLIP, {"do_normalize": None}, "do_normalize = None, expected True"),
        (CLIP, {"do_center_crop": False}, "size = .*expected a height and a width where nothing is cropped"),
        (SIGLIP, {"do_resize": False}, "do_resize = False, expected True"),
        (SIGLIP, {"do_normalize": False}, "do_normalize = False, expected True"),
        (SIGLIP, {"do_pad": True}, "do_pad = True, expected False"),
        (SIGLIP, {"rescale_factor": 1 / 127.5}, "rescale_factor = 0.0078.*expected 1/255"),
        (SIGLIP, {"resample": 5}, "resample = 5, expected one of 0, 1, 2, 3"),
        (SIGLIP, {"rescale_factor": "1/255"}, "rescale_factor = '1/255', expected 1/255"),
        (SIGLIP, {"image_mean": [0.5, 0.5]}, r"image_mean = \[0.5, 0.5\], expected three numbers"),
        (SIGLIP, {"image_std": [0.5, 0, 0.5]}, r"image_std = \[0.5, 0, 0.5\], expected numbers other than 0"),
        (SIGLIP, {"resample": [3]}, r"resample = \[3\], expected one of 0, 1, 2, 3"),
        (SIGLIP, {"image_processor_type": ["x"]}, r"image_processor_type = \['x'\], expected"),
        (SIGLIP, {"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViT"),
        (SIGLIP, {"novel_step": "sharpen"}, "novel_step = 'sharpen', expected no unknown key"),
    ],
)
def test_other_steps_are_refused_by_file_key_and_value(read, family, values, sentence):
    with pytest.raises(UserError, match=rf"preprocessor_config.json has {sentence}"):
        read(family, values)
    with pytest.raises(UserError, match=rf"processor_config.json has image_processor.{sentence}"):
        read(family, processor={"image_processor": values})


def test_unknown_parts_of_a_processor_are_refused(read):
    with pytest.raises(UserError, match="processor_config.json has video_processor = "):
        read(processor={"video_processor": {"fps": 2}})
    with pytest.raises(UserError, match="has no object at image_processor"):
        read(processor={"image_processor": [1]})


def test_saving_removes_an_earlier_processor_config(read, tmp_path):
    read(processor={"image_processor": IMAGENET})
    write_preprocessing(tmp_path, Preprocessing.clip(224), processor_class="CLIPProcessor")
    assert read(CLIP) == Preprocessing.clip(224)
