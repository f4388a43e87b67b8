"""The set of single objects on disk: cached, divided, and the same scenes in every style."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.few_shot import protocols
from paligemma_jax.data.few_shot.coop import write_split_file
from paligemma_jax.data.few_shot.descriptions import read_descriptions, write_descriptions
from paligemma_jax.data.few_shot.synthetic_classes import class_descriptions, synthetic_classes
from paligemma_jax.data.synthetic_clevr.classes import CLASSES, in_halves
from train_jax.core.errors import UserError

FEW = {"train": 1, "test": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(cache):
    return synthetic_classes(cache, 16, FEW)


def test_every_class_has_its_images(plain):
    assert plain.classes == tuple(values.name for values in CLASSES)
    for split in ("train", "test"):
        assert [label for _, label in sorted(plain.splits[split], key=lambda e: e.label)] == list(range(96))
    assert not plain.splits["val"]
    image, label = plain.splits["train"][0]
    assert image.startswith(plain.classes[label].replace(" ", "_") + "/train_")
    assert np.asarray(Image.open(plain.root / image)).shape == (16, 16, 3)


def test_the_set_is_rendered_once(cache, plain, monkeypatch):
    monkeypatch.setattr("paligemma_jax.data.few_shot.synthetic_classes.class_scenes", None)
    assert synthetic_classes(cache, 16, FEW).digest == plain.digest


def test_of_two_processes_the_first_one_s_set_stays(tmp_path, plain, monkeypatch):
    folder = tmp_path / plain.root.parent.name

    def write_after_the_other(dataset, draft):
        shutil.copytree(plain.root.parent, folder)
        write_split_file(dataset, draft)

    monkeypatch.setattr("paligemma_jax.data.few_shot.synthetic_classes.write_split_file", write_after_the_other)
    assert synthetic_classes(tmp_path, 16, FEW).digest == plain.digest
    assert list(tmp_path.iterdir()) == [folder]


def test_splits_share_no_image(plain):
    pictures = [(plain.root / image).read_bytes() for rows in plain.splits.values() for image, _ in rows]
    assert len(set(pictures)) == len(pictures)


def test_novel_classes_may_have_colors_of_their_own():
    base, novel = in_halves("colors")[:48], in_halves("colors")[48:]
    assert sorted(base + novel) == sorted(CLASSES)
    colors = {values.color for values in base}, {values.color for values in novel}
    assert len(colors[0]) == len(colors[1]) == 4 and not colors[0] & colors[1]
    for values in base, novel:
        assert len({(one.size, one.material, one.shape) for one in values}) == 12
    assert in_halves("combinations") == CLASSES
    with pytest.raises(UserError, match="novel classes differ in 'shapes', expected one of combinations, colors"):
        in_halves("shapes")


def test_novel_classes_may_have_the_other_pairing_of_material_and_shape():
    base, novel = in_halves("pairings")[:48], in_halves("pairings")[48:]
    assert sorted(base + novel) == sorted(CLASSES)
    for part, other in (base, novel), (novel, base):
        material_of = dict((one.shape, one.material) for one in part)
        assert all(material_of[one.shape] == one.material for one in part)
        assert all(material_of[one.shape] != one.material for one in other)
        assert len({(one.size, one.color, one.shape) for one in part}) == 48


def test_base_classes_and_shifted_styles(cache, plain):
    base, novel = plain.base_to_novel()
    assert len(base.classes) == len(novel.classes) == 48
    dim = synthetic_classes(cache, 16, {"test": 1}, style="dim")
    assert dim.name != plain.name and dim.splits["test"] == plain.splits["test"] and not dim.splits["train"]
    ours, theirs = (np.asarray(Image.open(d.root / d.splits["test"][0].image)).mean() for d in (plain, dim))
    assert theirs < 0.6 * ours
    protocol = protocols.domain_generalization(plain, {"dim": dim}, 1, 0)
    assert list(protocol.tested) == [plain.name, "dim"]


def test_descriptions_are_a_file_like_any_other(plain, tmp_path):
    write_descriptions(tmp_path / "d.json", class_descriptions())
    sentences = read_descriptions(tmp_path / "d.json", plain.classes)
    assert len({len(group) for group in sentences}) == 1  # one position has the same form for all classes
    assert sentences[5] == class_descriptions()[plain.classes[5]]
    assert class_descriptions()[CLASSES[5].in_other_words] == sentences[5]


@pytest.mark.parametrize(
    "options, message", [({"style": "dimm"}, "the style is 'dimm'"), ({"per_class": {}}, "images per class are {}")]
)
def test_errors(cache, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        synthetic_classes(cache, 16, **options)
