import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paligemma_jax.data.records import BadRow, GuardedSource
from paligemma_jax.data.sources.jsonl import JsonlRecords
from paligemma_jax.images.preprocessing import decode
from train_jax.core import digests
from train_jax.core.errors import UserError

SAMPLE = Path(__file__).parents[4] / "docs" / "sample_data"


def row(image, prefix="answer en What?", suffix="a duck", **more):
    return json.dumps({"image": image, "prefix": prefix, "suffix": suffix} | more, ensure_ascii=False)


@pytest.fixture
def folder(tmp_path, make_png):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(make_png(i))
    return tmp_path


def write(folder, *lines, name="train.jsonl", end="\n"):
    (folder / name).write_bytes(end.join(lines).encode())
    return folder / name


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_lines_are_rows_in_order(folder, end, make_png):
    lines = [row(f"images/{i % 3}.png", f"Was ist Nr. {i}? 漢字", f"eine Ente {i}") for i in range(7)]
    source = JsonlRecords(write(folder, *lines, end=end))
    assert len(source) == 7
    for i in (6, 0, 3, 5):
        record = source[i]
        assert (record.prefix, record.suffix) == (f"Was ist Nr. {i}? 漢字", f"eine Ente {i}")
        assert record.image == make_png(i % 3) and record.image_name == f"images/{i % 3}.png"
        assert record.image_index == i % 3 and record.weight == 1
    with pytest.raises(IndexError):
        source[7]


def test_further_keys_are_ignored(folder):
    assert JsonlRecords(write(folder, row("images/0.png", id=7)))[0].suffix == "a duck"


@pytest.mark.parametrize(
    "line, message",
    [('{"image": ', "no JSON"), ("[1]", "expected an object"), ('{"image": "images/0.png", "prefix": "x"}', "suffix"),
     (row("images/0.png", suffix=3), "expected an object"),
     (row("images/absent.png"), "cannot read 'images/absent.png'"),
     (row("images"), "cannot read 'images'"), (row("images/\0.png"), "expected an object"),
     ('{"image": "\\ud8', "no JSON")],
)  # fmt: skip
def test_a_malformed_line_is_a_bad_row_with_file_and_line(folder, line, message):
    source = JsonlRecords(write(folder, row("images/0.png"), "", line, row("images/1.png")))
    with pytest.raises(BadRow, match=rf"train\.jsonl line 3.*{message}"):
        source[1]
    assert [source[i].image_name for i in (0, 2)] == ["images/0.png", "images/1.png"]
    assert source[0].image_index != source[2].image_index


def test_bytes_that_are_not_utf8_are_a_bad_row(folder):
    file = write(folder, row("images/0.png"))
    file.write_bytes(file.read_bytes() + b"\n\xff\xfe\xfa broken \x80\n")
    with pytest.raises(BadRow, match="line 2"):
        JsonlRecords(file)[1]


@pytest.mark.parametrize(
    "path", ["../secret.png", "images/../../secret.png", "/etc/hostname", "link.png", "away/x.png"]
)
def test_no_path_leaves_the_folder(tmp_path, make_png, path):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(make_png(0))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "away").symlink_to(tmp_path)
    with pytest.raises(UserError, match=rf"line 1.*{re.escape(path)}.*leaves the folder"):
        JsonlRecords(write(folder, row(path)))


def test_paths_that_stay_inside_are_fine(folder):
    source = JsonlRecords(write(folder, row("images/../images/2.png"), row(str(folder / "images/1.png"))))
    assert len(source[0].image) > 0 and source[1].image == (folder / "images/1.png").read_bytes()


def test_folder_and_split_choose_the_file(folder):
    write(folder, row("images/0.png", "only"), name="train.jsonl")
    assert JsonlRecords(folder)[0].prefix == "only"
    write(folder, row("images/0.png", "held out"), name="validation.jsonl")
    assert JsonlRecords(folder, "validation")[0].prefix == "held out"
    with pytest.raises(UserError, match="train.jsonl, validation.jsonl, expected exactly one"):
        JsonlRecords(folder)
    with pytest.raises(UserError, match="expected test.jsonl"):
        JsonlRecords(folder, "test")
    with pytest.raises(UserError, match="no JSONL file"):
        JsonlRecords(folder / "images")


def test_one_file_never_serves_as_two_splits(folder):
    write(folder, row("images/0.png"), name="data.jsonl")
    with pytest.raises(UserError, match="expected validation.jsonl"):
        JsonlRecords(folder, "validation")


def test_empty_file_is_refused(folder):
    with pytest.raises(UserError, match="no rows"):
        JsonlRecords(write(folder, "", "  "))


def test_fingerprint_follows_the_content(folder):
    first = JsonlRecords(write(folder, row("images/0.png"))).fingerprint
    assert JsonlRecords(write(folder, row("images/0.png"), name="copy.jsonl")).fingerprint == first
    assert JsonlRecords(write(folder, row("images/1.png"))).fingerprint != first


def test_threads_and_copies_read_the_same(folder):
    source = JsonlRecords(write(folder, *(row(f"images/{i % 3}.png", f"{i}") for i in range(50))))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i].prefix, range(50))) == [str(i) for i in range(50)]
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_the_sample_in_the_documentation_is_readable_and_small():
    train, validation = JsonlRecords(SAMPLE, "train"), JsonlRecords(SAMPLE, "validation")
    records = [source[i] for source in (train, validation) for i in range(len(source))]
    assert len(records) == 10
    images = [decode(record.image) for record in records]
    assert all(image.shape == (64, 64, 3) and image.std() > 5 for image in images)
    assert not {r.image for r in map(train.__getitem__, range(len(train)))} & {
        r.image for r in map(validation.__getitem__, range(len(validation)))
    }
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file()) < 40_000


def test_captions_need_no_prefix(folder):
    write(folder, json.dumps({"image": "images/0.png", "text": "a duck"}), row("images/0.png"))
    rows = JsonlRecords(folder, "train", caption="text")
    assert (rows[0].prefix, rows[0].suffix, rows[0].image_name) == ("", "a duck", "images/0.png")
    with pytest.raises(BadRow, match=r"train.jsonl line 2 is .*, expected an object with the texts image, text"):
        rows[1]
    assert rows.fingerprint != JsonlRecords(folder, "train", caption="other").fingerprint


def test_an_image_is_its_bytes(folder, make_png):
    """Copies share an index, missing images one per name, malformed lines none; changed bytes are detected."""
    (folder / "copy.png").write_bytes(make_png(0))
    names = ["images/0.png", "copy.png", "images/../copy.png", "images/1.png", "lost.png", "lost.png", "gone.png"]
    source = JsonlRecords(write(folder, *map(row, names), "{"))
    assert source.image_numbers().tolist() == [0, 0, 0, 1, 2, 2, 3, 4]
    assert [source[i].image_index for i in range(4)] == [0, 0, 0, 1]
    (folder / "copy.png").write_bytes(make_png(5))
    changed = JsonlRecords(folder / "train.jsonl")
    assert changed.image_numbers().tolist() == [0, 1, 1, 2, 3, 3, 4, 5] and changed.fingerprint != source.fingerprint


def test_digests_are_kept_until_an_image_changes(folder, tmp_path, make_png, monkeypatch):
    file = write(folder, row("images/0.png"), row("images/1.png"))
    first = JsonlRecords(file, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "digest", lambda data: pytest.fail("an image was read again"))
        assert JsonlRecords(file, cache=tmp_path / "cache").fingerprint == first.fingerprint
    (folder / "images/1.png").write_bytes(make_png(0))
    assert JsonlRecords(file, cache=tmp_path / "cache").image_numbers().tolist() == [0, 0]


DEEP = "[" * 10**5 + "]" * 10**5


@pytest.mark.parametrize("caption", [None, "suffix"])
@pytest.mark.parametrize(
    "line",
    [
        row("images/0.png", suffix="x").replace('"x"', r'"cut \ud83d"'),
        row("x").replace('"x"', r'"\ud83d.png"'),
        row("x").replace('"x"', r'"images/\udc80.png"'),
        row("images/0.png").replace("}", ', "deep": ' + DEEP + "}"),
        DEEP,
        row("data:image/png;base64," + "iVBORw0KGgo/" * 5000),
        row("data:,"),
        row("a" * 5000 + ".png"),
        row("https://example.com/" + "a" * 9000),
        row("circle.png"),
        row("images/0.png", suffix=None),
        row(None),
        '{"image": 1' + "0" * 5000 + "}",
    ],
    ids=lambda line: line[:24] if isinstance(line, str) else line,
)
def test_malformed_lines_raise_bad_row(folder, line, caption):
    """Under both policies, and the message quotes at most a line's length of it."""
    (folder / "circle.png").symlink_to(folder / "circle.png")
    source = JsonlRecords(write(folder, row("images/0.png"), line), caption=caption)
    skipping = GuardedSource(source, lambda record: {}, max_bad_fraction=1.0)
    assert [skipping[i]["bad"] for i in range(2)] == [False, True]
    with pytest.raises(BadRow, match=r"train\.jsonl line 2") as error:
        GuardedSource(source, lambda record: {}, on_error="raise")[1]
    assert len(str(error.value)) < 700 and str(error.value).isprintable()


def test_half_a_surrogate_pair_in_the_prefix_is_a_bad_row(folder):
    line = row("images/0.png", prefix="x").replace('"x"', r'"cut \ud83d"')
    with pytest.raises(BadRow, match="line 1 has the prefix"):
        JsonlRecords(write(folder, line))[0]


def test_suffixes_are_read_without_images(folder):
    source = JsonlRecords(write(folder, row("lost.png", suffix="a goose"), "{"))
    assert source.suffix(0) == "a goose"
    with pytest.raises(BadRow):
        source.suffix(1)
