import json
import os
import pickle
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from paligemma_jax.data.records import BadRow, GuardedSource
from paligemma_jax.data.sources import clevr_tree as clevr_tree_module
from paligemma_jax.data.sources.clevr import ClevrQuestions, prepare_clevr
from paligemma_jax.images.preprocessing import decode
from train_jax.core.errors import UserError

QUESTIONS = {"train": 4, "validation": 3, "test": 1}


@pytest.fixture(scope="module")
def upstream(clevr_tree, tmp_path_factory):
    """The same tree written by TFDS's own builder; its two uses of TensorFlow are file-system calls."""
    from tensorflow_datasets.datasets.clevr import clevr_dataset_builder as module

    class Upstream(module.Builder, skip_registration=True):
        name = "clevr"
        pkg_dir_path = Path(module.__file__).parent

        def _split_generators(self, dl_manager):
            return super()._split_generators(types.SimpleNamespace(download_and_extract=lambda url: clevr_tree.parent))

    gfile = types.SimpleNamespace(listdir=os.listdir, exists=os.path.exists)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tf", types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile)))
        builder = Upstream(data_dir=tmp_path_factory.mktemp("upstream"), file_format="array_record")
        builder.download_and_prepare()
    return builder.data_path


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype


def test_features_equal_those_of_the_public_builder(upstream, prepared_clevr):
    ours, theirs = (json.loads((folder / "features.json").read_text()) for folder in (prepared_clevr, upstream))
    assert ours == theirs
    for name in ("color", "material", "shape", "size"):
        labels = f"objects-{name}.labels.txt"
        assert (prepared_clevr / labels).read_text() == (upstream / labels).read_text()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_examples_equal_those_of_the_public_builder(upstream, prepared_clevr, split):
    decoders = {"image": tfds.decode.SkipDecoding()}
    ours, theirs = (
        tfds.builder_from_directory(folder).as_data_source(split, decoders=decoders)
        for folder in (prepared_clevr, upstream)
    )
    assert len(ours) == len(theirs) == {"train": 5, "validation": 3, "test": 2}[split]
    assert all(same(ours[i], theirs[i]) for i in range(len(ours)))


def test_readable_by_the_official_name_without_tensorflow(prepared_clevr):
    source = tfds.data_source("clevr", data_dir=prepared_clevr.parents[1], split="train")
    assert len(source) == 5 and source[0]["image"].shape[:2] == (6, 9)
    assert "tensorflow" not in sys.modules


def test_every_question_is_a_row_with_its_image(prepared_clevr, clevr_tree):
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        questions = json.loads((clevr_tree / f"questions/CLEVR_{name}_questions.json").read_text())["questions"]
        expected = {(q["image_filename"], q["question"], q.get("answer", "")) for q in questions}
        source = ClevrQuestions(prepared_clevr, split)
        records = [source[i] for i in range(len(source))]
        assert len(source) == QUESTIONS[split]
        assert {(r.image_name, r.prefix, r.suffix) for r in records} == expected
        for record in records:
            assert record.image == (clevr_tree / "images" / name / record.image_name).read_bytes()
            assert record.weight == 1
        assert len({(r.image_index, r.image_name) for r in records}) == len({r.image_name for r in records})
        assert len({r.image_index for r in records}) == len({r.image_name for r in records})


def test_prompt_wraps_the_question(prepared_clevr):
    plain, prompted = ClevrQuestions(prepared_clevr), ClevrQuestions(prepared_clevr, prompt="answer en {question}")
    assert prompted[2].prefix == "answer en " + plain[2].prefix
    assert prompted.fingerprint != plain.fingerprint
    with pytest.raises(UserError, match=r"\{question\}"):
        ClevrQuestions(prepared_clevr, prompt="answer en")


def test_index_is_kept_beside_the_data_and_reused(prepared_clevr, monkeypatch):
    first = ClevrQuestions(prepared_clevr, "validation")
    assert (prepared_clevr / "questions-validation.npz").is_file()
    assert not [file for file in prepared_clevr.iterdir() if file.name.startswith("tmp")]
    monkeypatch.setattr("paligemma_jax.data.sources.clevr.tqdm", None)  # a second pass over the split would need it
    second = ClevrQuestions(prepared_clevr, "validation")
    assert second.fingerprint == first.fingerprint and second[0] == first[0]


def test_an_index_that_cannot_be_stored_is_recomputed(prepared_clevr, monkeypatch, tmp_path):
    folder = shutil.copytree(prepared_clevr, tmp_path / "3.1.0", ignore=shutil.ignore_patterns("*.npz"))

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("paligemma_jax.data.sources.clevr.np.savez", full)
    assert len(ClevrQuestions(folder)) == QUESTIONS["train"]
    assert not (folder / "questions-train.npz").exists()


def test_fingerprint_depends_on_content_not_place(prepared_clevr, make_clevr_tree, tmp_path):
    moved = shutil.copytree(prepared_clevr, tmp_path / "moved")
    other = prepare_clevr(make_clevr_tree(tmp_path / "CLEVR_v1.0", seed=1), tmp_path / "data")
    prints = [ClevrQuestions(folder).fingerprint for folder in (prepared_clevr, moved, other)]
    assert prints[0] == prints[1] != prints[2]
    assert ClevrQuestions(prepared_clevr, "validation").fingerprint != prints[0]


def test_zip_gives_the_same_data_as_the_folder(clevr_tree, prepared_clevr, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "CLEVR_v1.0"), "zip", clevr_tree.parent, clevr_tree.name)
    folder = prepare_clevr(archive, tmp_path / "data")
    from_zip, from_folder = ClevrQuestions(folder), ClevrQuestions(prepared_clevr)
    assert from_zip.fingerprint == from_folder.fingerprint
    assert [from_zip[i] for i in range(4)] == [from_folder[i] for i in range(4)]
    assert not list(tmp_path.rglob("*.png"))  # nothing was extracted


def test_preparing_again_changes_nothing(clevr_tree, tmp_path):
    folder = prepare_clevr(clevr_tree.parent, tmp_path)  # the folder that holds CLEVR_v1.0
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare_clevr(clevr_tree, tmp_path) == folder
    assert prepare_clevr(tmp_path / "deleted.zip", tmp_path) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_data_prepared_from_another_tree_are_refused(clevr_tree, make_clevr_tree, tmp_path):
    prepare_clevr(clevr_tree, tmp_path / "data")
    other = make_clevr_tree(tmp_path / "CLEVR_v1.0", seed=1)
    with pytest.raises(UserError, match="another tree.*choose another data_dir"):
        prepare_clevr(other, tmp_path / "data")


def test_a_tree_with_two_splits_is_enough(make_clevr_tree, tmp_path):
    folder = prepare_clevr(make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 3, "val": 2}), tmp_path / "data")
    assert len(ClevrQuestions(folder, "validation")) == 1
    with pytest.raises(UserError, match=r"no split 'test'.*train.*validation"):
        ClevrQuestions(folder, "test")


def test_scenes_are_joined_by_name_not_by_position(make_clevr_tree, tmp_path):
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 3})
    file = tree / "scenes/CLEVR_train_scenes.json"
    file.write_text(json.dumps({"scenes": json.loads(file.read_text())["scenes"][::-1]}))
    source = tfds.builder_from_directory(prepare_clevr(tree, tmp_path / "data")).as_data_source("train")
    counts = {example["file_name"].decode(): len(example["objects"]["color"]) for example in source}
    assert counts == {f"CLEVR_train_{i:06d}.png": i % 3 + 1 for i in range(3)}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda tree: shutil.rmtree(tree / "images/val"), "lacks images/val"),
        (lambda tree: shutil.rmtree(tree / "questions"), "lacks questions/CLEVR_train_questions.json"),
        (lambda tree: (tree / "images/train/CLEVR_train_000004.png").unlink(), "1 images .* 'CLEVR_train_000004.png'"),
        (lambda tree: (tree / "questions/CLEVR_val_questions.json").write_text('{"questions": [{'), "val_questions"),
        (lambda tree: (tree / "questions/CLEVR_val_questions.json").write_text('{"info": {}}'), "questions"),
        (lambda tree: (tree / "scenes/CLEVR_train_scenes.json").write_text('{"scenes": [{"a": 1}]}'), "image_filename"),
    ],
)
def test_a_broken_tree_is_refused_and_leaves_nothing_behind(make_clevr_tree, tmp_path, damage, message):
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0")
    damage(tree)
    with pytest.raises(UserError, match=message):
        prepare_clevr(tree, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("color", "pink", "'pink', expected one of gray, blue"),
        ("shape", None, "None, expected one of cube"),
        ("size", 1, "1, expected one of small"),
        ("material", ["metal"], r"\['metal'\], expected one of rubber"),
        ("rotation", "x", "'x', expected a finite number"),
        ("rotation", None, "None, expected a finite number"),
        ("3d_coords", [1, 2], r"\[1, 2\], expected 3 finite numbers"),
        ("pixel_coords", [1, 2, float("nan")], r"\[1, 2, nan\], expected 3 finite numbers"),
    ],
)
def test_scenes_with_values_that_clevr_lacks_are_refused(make_clevr_tree, tmp_path, field, value, expected):
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0")
    file = tree / "scenes/CLEVR_train_scenes.json"
    scenes = json.loads(file.read_text())
    scene = next(scene for scene in scenes["scenes"] if scene["objects"])
    scene["objects"][0][field] = value
    file.write_text(json.dumps(scenes))
    with pytest.raises(UserError, match=rf"the scene of {scene['image_filename']} has {field} = {expected}"):
        prepare_clevr(tree, tmp_path / "data")


def test_a_source_that_is_not_a_clevr_tree_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for source, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "notes.txt", "no zip"),
        (tmp_path, "lacks"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_clevr(source, tmp_path / "data")
    with pytest.raises(UserError, match="data.source"):
        ClevrQuestions(tmp_path / "data")


def test_a_corrupt_image_keeps_its_slot(make_clevr_tree, tmp_path):
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 5})
    (tree / "images/train/CLEVR_train_000002.png").write_bytes(b"not a PNG")  # has two of the four questions
    source = ClevrQuestions(prepare_clevr(tree, tmp_path / "data"))
    guarded = GuardedSource(source, lambda r: {"mean": np.float32(decode(r.image).mean())}, max_bad_fraction=0.5)
    examples = [guarded[i] for i in range(len(guarded))]
    guarded.on_rows(range(len(guarded)), [example["bad"] for example in examples])
    weights = [float(example["weight"]) for example in examples]
    assert weights == [float(source[i].image_name != "CLEVR_train_000002.png") for i in range(4)]
    assert set(guarded.bad_rows.values()) == {"CLEVR_train_000002.png"} and sum(weights) == 2


def test_a_damaged_record_is_a_bad_row_or_unchanged(prepared_clevr, tmp_path):
    folder = shutil.copytree(prepared_clevr, tmp_path / "3.1.0")
    intact = [ClevrQuestions(folder)[i] for i in range(4)]
    shard = next(folder.glob("clevr-train*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    shard.write_bytes(data)
    guarded = GuardedSource(ClevrQuestions(folder), lambda r: {"prefix": np.array(r.prefix)}, max_bad_fraction=1.0)
    examples = [guarded[i] for i in range(4)]
    assert any(example["bad"] for example in examples)
    assert all(str(examples[i]["prefix"]) == intact[i].prefix for i in range(4) if not examples[i]["bad"])


def test_threads_and_copies_read_the_same(prepared_clevr):
    source = ClevrQuestions(prepared_clevr, cache_bytes=1)
    rows = [source[i] for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i % 4], range(64))) == [rows[i % 4] for i in range(64)]
    assert pickle.loads(pickle.dumps(source))[3] == rows[3]
    with pytest.raises(IndexError):
        source[4]


def test_a_tfrecord_tree_names_the_conversion(prepared_clevr, tmp_path):
    folder = shutil.copytree(prepared_clevr, tmp_path / "3.1.0")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="convert_tfrecord"):
        ClevrQuestions(folder)


def asked(tree, answers, split="train"):
    """A tree whose first image has questions with these answers only."""
    name = f"CLEVR_{split}_000000.png"
    rows = [{"image_filename": name, "question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    (tree / f"questions/CLEVR_{split}_questions.json").write_text(json.dumps({"questions": rows}))
    return tree


def test_answers_of_the_official_generator_are_words(make_clevr_tree, tmp_path):
    tree = asked(make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 1}), [True, False, 3, 0, 10, "cube", "no"])
    source = ClevrQuestions(prepare_clevr(tree, tmp_path / "out"))
    assert [source[i].suffix for i in range(7)] == ["yes", "no", "3", "0", "10", "cube", "no"]


def test_values_that_are_not_text_are_bad_rows_of_the_tree(make_clevr_tree, tmp_path):
    """Other rows are not affected; questions that are not text are bad rows too."""
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 1})
    asked(tree, ["yes", None, 2.5, [], {"a": 1}, "cut \ud83d", "no"])
    file = tree / "questions/CLEVR_train_questions.json"
    rows = json.loads(file.read_text())["questions"]
    name = rows[0]["image_filename"]
    more = [{"image_filename": name, "answer": "yes"}, {"image_filename": name, "question": 3, "answer": "yes"}]
    file.write_text(json.dumps({"questions": rows + more}))
    source = ClevrQuestions(prepare_clevr(tree, tmp_path / "out"))
    guarded = GuardedSource(source, lambda record: {}, max_bad_fraction=1.0)
    assert [bool(guarded[i]["bad"]) for i in range(9)] == [False, *[True] * 5, False, True, True]
    for i, result in ((1, "answer None"), (2, r"answer 2\.5"), (5, r"answer 'cut \\ud83d'"), (7, "question None")):
        with pytest.raises(BadRow, match=f"question {i} of CLEVR_train_000000.png has the {result}"):
            source[i]


@pytest.mark.parametrize(
    "document",
    [
        '{"questions": [' + "[" * 10**5 + "]" * 10**5 + "]}",
        '{"questions": [3]}',
        '{"questions": [{"question": "?", "answer": "yes"}]}',
        '{"questions": [{"image_filename": [], "question": "?", "answer": "yes"}]}',
        '{"questions": [{"image_filename": "\\ud83d.png", "question": "?", "answer": "yes"}]}',
    ],
    ids=["deep", "number", "no image", "list", "surrogate"],
)
def test_malformed_question_files_raise_user_errors(make_clevr_tree, tmp_path, document):
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 1})
    (tree / "questions/CLEVR_train_questions.json").write_text(document)
    with pytest.raises(UserError, match=r"CLEVR_train_questions\.json") as error:
        prepare_clevr(tree, tmp_path / "out")
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_two_files_with_equal_bytes_are_one_image(make_clevr_tree, tmp_path):
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 6})
    images = tree / "images/train"
    shutil.copy(images / "CLEVR_train_000002.png", images / "CLEVR_train_000005.png")
    source = ClevrQuestions(prepare_clevr(tree, tmp_path / "out"))
    by_name = {source[i].image_name: source[i].image_index for i in range(len(source))}
    assert by_name["CLEVR_train_000002.png"] == by_name["CLEVR_train_000005.png"] != by_name["CLEVR_train_000001.png"]
    assert source.image_numbers().tolist() == [source[i].image_index for i in range(len(source))]


def test_other_images_under_the_same_names_are_another_tree(make_clevr_tree, tmp_path):
    """Holds for a folder and a zip, which are otherwise the same tree; a new time of a file changes nothing."""
    tree = make_clevr_tree(tmp_path / "a/CLEVR_v1.0", {"train": 2})
    archive = shutil.make_archive(str(tmp_path / "b"), "zip", tree.parent, tree.name)
    assert clevr_tree_module.ClevrTree(tree).identity() == clevr_tree_module.ClevrTree(archive).identity()
    prepare_clevr(archive, tmp_path / "out")
    image = tree / "images/train/CLEVR_train_000001.png"
    os.utime(image, (1, 1))
    prepare_clevr(tree, tmp_path / "out")
    shutil.copy(tree / "images/train/CLEVR_train_000000.png", image)
    with pytest.raises(UserError, match="prepared from another tree"):
        prepare_clevr(tree, tmp_path / "out")


def test_data_prepared_by_an_older_version_are_accepted(make_clevr_tree, tmp_path):
    """Their stored identity lacks entries that are stored now."""
    tree = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 2})
    folder = prepare_clevr(tree, tmp_path / "out")
    recorded = json.loads((folder / "source.json").read_text())
    del recorded["train"]["images_sha256"]
    (folder / "source.json").write_text(json.dumps(recorded))
    assert prepare_clevr(tree, tmp_path / "out") == folder


def test_the_index_is_recomputed_when_the_data_change(make_clevr_tree, tmp_path):
    folders = [
        prepare_clevr(make_clevr_tree(tmp_path / f"{seed}/CLEVR_v1.0", {"train": 3}, seed), tmp_path / f"out{seed}")
        for seed in (0, 1)
    ]
    before, other = (ClevrQuestions(folder).fingerprint for folder in folders)
    (shard,) = folders[1].glob("*.array_record*")
    shutil.copy(shard, next(folders[0].glob("*.array_record*")))
    assert ClevrQuestions(folders[0]).fingerprint == other != before
