import io
import json

import pytest

from paligemma_jax.data.sources import clevr_tree
from paligemma_jax.data.sources.clevr_tree import ClevrTree, stream_array
from train_jax.core.errors import UserError

DOCUMENT = {
    "info": {"questions": ["not these"], "version": 1.25},
    "n": 17,
    "questions": [
        {"q": 'a "quoted" ] } text', "deep": [[1, 2], {"x": None}]},
        3,
        -4.5e-3,
        "text",
        [],
        {},
        True,
        1234567,
    ],
    "after": [9],
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_streaming_equals_loading_whatever_the_chunk(monkeypatch, chunk, indent):
    monkeypatch.setattr(clevr_tree, "CHUNK", chunk)
    text = json.dumps(DOCUMENT, indent=indent)
    for key in ("questions", "after"):
        assert list(stream_array(io.StringIO(text), key)) == DOCUMENT[key]


def test_streaming_reads_no_further_than_needed(monkeypatch):
    monkeypatch.setattr(clevr_tree, "CHUNK", 16)
    text = io.StringIO(json.dumps({"questions": list(range(1000))}))
    stream = stream_array(text, "questions")
    assert [next(stream) for _ in range(5)] == list(range(5))
    assert text.tell() < 64


def test_empty_list_and_missing_key():
    assert list(stream_array(io.StringIO('{"questions": [ ]}'), "questions")) == []
    with pytest.raises(KeyError):
        list(stream_array(io.StringIO('{"info": 1}'), "questions"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"questions"', '{"questions": 3}', '{"questions": [1, 2', '{"questions": [1 2]}']
)
def test_other_json_documents_are_refused(text):
    with pytest.raises(ValueError):
        list(stream_array(io.StringIO(text), "questions"))


@pytest.mark.parametrize("kind, read", [("questions", ClevrTree.questions), ("scenes", ClevrTree.objects)])
@pytest.mark.parametrize(
    "entries, reason",
    [
        ([1, None], "found 1 where an object was expected"),
        (["a"], "found 'a' where an object was expected"),
        ([{"question": "?", "objects": []}], "it lacks 'image_filename'"),
        ([{"question": "?", "objects": [], "image_filename": name} for name in (None, "x")], "the image_filename None"),
        ([{"question": "?", "objects": [], "image_filename": ["x"]}], r"the image_filename \['x'\]"),
    ],
)
def test_entries_that_are_not_objects_are_refused(make_clevr_tree, tmp_path, kind, read, entries, reason):
    tree = ClevrTree(make_clevr_tree(tmp_path))
    (tree.root / kind / f"CLEVR_train_{kind}.json").write_text(json.dumps({kind: entries}))
    with pytest.raises(
        UserError, match=rf"cannot be read \(.*{reason}.*\), expected CLEVR's JSON with a list '{kind}'"
    ):
        read(tree, "train")


def test_a_scene_without_a_list_of_objects_is_refused(make_clevr_tree, tmp_path):
    tree = ClevrTree(make_clevr_tree(tmp_path))
    scenes = [{"image_filename": "x.png", "objects": 5}]
    (tree.root / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))
    with pytest.raises(UserError, match=r"\(found 5 where the list objects was expected\)"):
        tree.objects("train")


def test_strange_files_among_the_images_are_ignored(make_clevr_tree, tmp_path):
    root = make_clevr_tree(tmp_path / "CLEVR_v1.0", {"train": 3})
    for name in ("._CLEVR_train_000000.png", "Thumbs.db", ".DS_Store"):
        (root / "images" / "train" / name).write_bytes(b"x")
    tree = ClevrTree(tmp_path)
    assert list(tree.image_files("train")) == [f"CLEVR_train_{i:06d}.png" for i in range(3)]
    assert tree.splits == ["train"]
