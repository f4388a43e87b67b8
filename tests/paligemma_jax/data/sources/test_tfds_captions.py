"""Captions of a data set that TFDS has prepared: rows, the order of captions, and refused data."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from paligemma_jax.data.records import BadRow
from paligemma_jax.data.sources.tfds_captions import TfdsCaptions
from train_jax.core.errors import UserError

CAPTIONS = [["a duck"], ["a cat", "a grey cat", "an animal"], []]
SEEDS = (0, 1, 0)  # of the images
features = tfds.features


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Three images, two of them equal, with one, three and no captions, and a title each."""

    name = "pictures"
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def __init__(self, *, pngs: list[bytes], **kwargs):
        self.pngs = pngs
        super().__init__(**kwargs)

    def _info(self):
        captions = features.Sequence({"text": features.Text(), "id": np.int64})
        columns = {"image": features.Image(), "captions": captions, "title": features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(columns))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, texts in enumerate(CAPTIONS):
            captions = [{"text": text, "id": at} for at, text in enumerate(texts)]
            yield number, {"image": self.pngs[number], "captions": captions, "title": f"picture {number}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, make_png):
    """A function of the file format: the version folder."""

    def prepare(file_format="array_record"):
        root = tmp_path_factory.mktemp("tfds")
        builder = Pictures(pngs=[make_png(seed) for seed in SEEDS], data_dir=root, file_format=file_format)
        builder.download_and_prepare()
        return root / "pictures/1.0.0"

    return prepare


@pytest.fixture(scope="module")
def folder(prepared):
    return prepared()


def test_a_row_is_a_caption_of_an_example(folder, make_png):
    rows = TfdsCaptions(folder, "train", caption="captions/text", views=4)
    assert len(rows) == 12
    result = {}
    for index in range(12):
        try:
            record = rows[index]
        except BadRow as error:
            assert f"train example {index % 3} of {folder} has no caption" in str(error)
            continue
        assert record.image == make_png(int("cat" in record.suffix or "animal" in record.suffix))
        assert record.image_index == rows.image_numbers()[index] and record.prefix == ""
        result.setdefault(index % 3, []).append(record.suffix)
    assert sorted(result.values()) == [["a cat", "a grey cat", "an animal", "a cat"], ["a duck"] * 4]
    np.testing.assert_array_equal(rows.image_numbers(), np.tile(rows.image_numbers()[:3], 4))
    assert sorted(np.bincount(rows.image_numbers()).tolist()) == [4, 8]  # two examples have equal images


def test_a_single_text_is_a_caption_too(folder):
    rows = TfdsCaptions(folder, "train", caption="title")
    assert sorted(rows[index].suffix for index in range(3)) == ["picture 0", "picture 1", "picture 2"]


def test_the_fingerprint_depends_on_the_rows(folder):
    def fingerprint(**options):
        return TfdsCaptions(folder, "train", **({"caption": "title"} | options)).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(views=2), fingerprint(caption="captions/text")}) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"caption": "text"}, "has no feature 'text', expected some of captions, image, title"),
        ({"caption": "captions/words"}, "has no feature 'captions/words', expected some of id, text"),
        ({"caption": "title", "image": "picture"}, "has no feature 'picture'"),
        ({"caption": "title", "split": "test"}, r"has no split 'test', expected one of \['train'\]"),
    ],
)
def test_missing_splits_and_features_are_refused(folder, options, sentence):
    with pytest.raises(UserError, match=sentence):
        TfdsCaptions(folder, **({"split": "train"} | options))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no dataset_info.json, expected a version folder of TFDS"):
        TfdsCaptions(tmp_path, "train")


@pytest.mark.parametrize("caption", ["captions/id", "image"])
def test_a_caption_that_is_not_text_is_a_bad_row(folder, caption):
    rows = TfdsCaptions(folder, "train", caption=caption)
    for index in range(3):
        with pytest.raises(BadRow, match=f"train example {index} of .* caption"):
            rows[index]


def test_digests_are_kept(folder, tmp_path, monkeypatch):
    first = TfdsCaptions(folder, "train", caption="title", cache=tmp_path)
    monkeypatch.setattr(TfdsCaptions, "_digests", lambda self: pytest.fail("the pictures were read again"))
    assert TfdsCaptions(folder, "train", caption="title", cache=tmp_path).fingerprint == first.fingerprint
