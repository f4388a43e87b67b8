import pickle
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_jax.data.records import BadRow
from paligemma_jax.data.sources import parquet
from paligemma_jax.data.sources.parquet import ParquetQuestions
from train_jax.core.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_shards(folder, rows, shards=2, split="train", group=3, image_type=IMAGE):
    """Rows are (question, image, answer); written as the Hub's `data/SPLIT-0000i-of-0000n.parquet`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    size = -(-len(rows) // shards)
    for shard in range(shards):
        part = rows[shard * size : (shard + 1) * size]
        columns = {
            "question": pa.array([row[0] for row in part], pa.string()),
            "image": pa.array([row[1] for row in part], image_type),
            "answer": pa.array([row[2] for row in part], pa.string()),
        }
        file = folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=group)
    return folder


def rows_of(count, make_png):
    """Two questions for each image."""
    return [
        (f"Question {i}?", {"bytes": make_png(i // 2), "path": f"CLEVR_{i // 2:06d}.png"}, f"answer {i}")
        for i in range(count)
    ]


@pytest.fixture
def rows(make_png):
    return rows_of(16, make_png)


def test_rows_come_in_file_order_across_shards_and_groups(tmp_path, rows):
    source = ParquetQuestions(write_shards(tmp_path, rows))
    assert len(source) == 16
    for i in (15, 0, 7, 8, 2, 3):  # across shard (8) and group (3) borders, in any order
        record = source[i]
        assert (record.prefix, record.suffix, record.image) == (rows[i][0], rows[i][2], rows[i][1]["bytes"])
        assert record.image_name == rows[i][1]["path"] and record.image_index == i // 2 and record.weight == 1
    with pytest.raises(IndexError):
        source[16]


def test_only_the_requested_split_is_read(tmp_path, rows):
    write_shards(tmp_path, rows)
    write_shards(tmp_path, rows[:3], shards=1, split="validation")
    assert len(ParquetQuestions(tmp_path, "validation")) == 3
    with pytest.raises(UserError, match=r"no test-\*\.parquet"):
        ParquetQuestions(tmp_path, "test")


@pytest.mark.parametrize("place", [".cache", "__MACOSX/data", "data/.ipynb_checkpoints"])
def test_copies_in_hidden_folders_are_left_out(tmp_path, rows, place):
    folder = tmp_path / ".cache/hub"  # only hidden names within the folder matter
    shard = write_shards(folder, rows, shards=1) / "data/train-00000-of-00001.parquet"
    (folder / place).mkdir(parents=True)
    shutil.copy(shard, folder / place)
    shutil.copy(shard, folder / "data/._train-0.parquet")
    assert len(ParquetQuestions(folder)) == len(rows)


@pytest.mark.parametrize("name", ["train.parquet", "train-0.PARQUET", "a/b/train.PARQUET"])
def test_names_of_a_single_file_are_read(tmp_path, rows, name):
    written = write_shards(tmp_path / "written", rows, shards=1) / "data/train-00000-of-00001.parquet"
    (tmp_path / "read" / name).parent.mkdir(parents=True)
    for each in (name, "training.parquet", "train.parquet.md5", "train2-0.parquet"):
        shutil.copy(written, tmp_path / "read" / each)
    assert len(ParquetQuestions(tmp_path / "read")) == len(rows)


@pytest.mark.parametrize("image_type", [IMAGE, pa.struct([("bytes", pa.binary())])])
def test_images_without_a_path_are_identified_by_their_bytes(tmp_path, make_png, image_type):
    rows = [(f"{i}?", {"bytes": make_png(i % 2), "path": None}, "yes") for i in range(5)]
    source = ParquetQuestions(write_shards(tmp_path, rows, image_type=image_type))
    assert [source[i].image_index for i in range(5)] == source.image_numbers().tolist() == [0, 1, 0, 1, 0]
    assert source[3].image_name == "row 3"


def test_two_images_of_one_name_are_two_and_one_of_two_names_is_one(tmp_path, make_png):
    """`datasets` stores cats/0001.png and dogs/0001.png with only the last part of the path."""
    named = [("0001.png", 0), ("0001.png", 1), ("copy.png", 0)]
    rows = [("?", {"bytes": make_png(number), "path": path}, "yes") for path, number in named]
    source = ParquetQuestions(write_shards(tmp_path, rows))
    assert source.image_numbers().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "image_type, form",
    [
        (pa.binary(), lambda data: data),
        (pa.large_binary(), lambda data: data),
        (pa.list_(pa.binary()), lambda data: [data]),
        (pa.list_(IMAGE), lambda data: [{"bytes": data, "path": "a.png"}]),
        (pa.list_(IMAGE, 1), lambda data: [{"bytes": data, "path": "a.png"}]),
    ],
)
def test_every_form_of_an_image_column_is_read(tmp_path, make_png, image_type, form):
    rows = [(f"{i}?", form(make_png(i // 2)), "yes") for i in range(4)]
    source = ParquetQuestions(write_shards(tmp_path, rows, image_type=image_type))
    assert [source[i].image for i in range(4)] == [make_png(i // 2) for i in range(4)]
    assert source.image_numbers().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "number, message", [(0, "lacks image bytes"), (None, "lacks image bytes"), (2, "holds 2 images")]
)
def test_no_image_or_several_are_a_bad_row(tmp_path, make_png, number, message):
    images = number if number is None else [make_png(i) for i in range(number)]
    rows = [("?", images, "yes"), ("?", [make_png(0)], "yes")]
    source = ParquetQuestions(write_shards(tmp_path, rows, image_type=pa.list_(pa.binary())))
    with pytest.raises(BadRow, match=f"row 0 {message}, expected"):
        source[0]
    assert source[1].suffix == "yes" and source.image_numbers().tolist() == [0, 1]


@pytest.mark.parametrize("column", ["question", "image", "answer"])
def test_dates_beyond_pythons_are_a_bad_row(tmp_path, make_png, column):
    columns = {"question": ["?"] * 2, "image": [make_png(0)] * 2, "answer": ["yes"] * 2}
    columns[column] = pa.array([2**30, 0], pa.date32())
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    source = ParquetQuestions(tmp_path)
    for index in range(2):  # a date is not text either
        with pytest.raises(BadRow, match=f"row {index} "):
            source[index]
    if column == "answer":
        with pytest.raises(BadRow, match="row 0 cannot be read"):
            source.suffix(0)


def test_shards_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no rows in its train shards"):
        ParquetQuestions(write_shards(tmp_path, []))


def test_times_of_an_unknown_zone_are_a_bad_row(tmp_path, make_png, monkeypatch):
    """pyarrow uses pytz if it is installed, which raises a KeyError."""

    def timezone(name):
        raise KeyError(name)

    monkeypatch.setitem(sys.modules, "pytz", types.SimpleNamespace(timezone=timezone))
    times = pa.array([0], pa.timestamp("us", "Mars/Phobos"))
    pq.write_table(pa.table({"question": ["?"], "image": [make_png(0)], "answer": times}), tmp_path / "train.parquet")
    with pytest.raises(BadRow, match="row 0 cannot be read"):
        ParquetQuestions(tmp_path)[0]


@pytest.mark.parametrize("column", ["question", "image", "answer"])
def test_a_duplicate_column_is_refused(tmp_path, make_png, column):
    columns = {"question": pa.array(["?"]), "image": pa.array([make_png(0)]), "answer": pa.array(["yes"])}
    table = pa.table(columns).append_column(column, columns[column])
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=rf"more than once \['{column}'\], expected each of .* once; rename"):
        ParquetQuestions(tmp_path)


@pytest.mark.parametrize(
    "answers",
    [[None, "2"], [0, 3], [2.5, 1.0], [True, False], [[], ["two"]], [["two", "2"], ["3"]], [{"a": "b"}, {"a": None}]],
)
def test_an_answer_that_is_not_text_is_a_bad_row(tmp_path, make_png, answers):
    image = pa.array([{"bytes": make_png(i), "path": f"{i}.png"} for i in range(2)], IMAGE)
    pq.write_table(pa.table({"question": ["?"] * 2, "image": image, "answer": answers}), tmp_path / "train-0.parquet")
    source = ParquetQuestions(tmp_path)
    with pytest.raises(BadRow, match=r"row 0 \(0.png\) .* expected an object with the texts question, answer"):
        source[0]
    with pytest.raises(BadRow, match="row 0"):
        source.suffix(0)


@pytest.mark.parametrize("question", [None, 3])
def test_a_question_that_is_not_text_is_a_bad_row(tmp_path, make_png, question):
    table = {"question": [question], "image": pa.array([{"bytes": make_png(0)}]), "answer": ["yes"]}
    pq.write_table(pa.table(table), tmp_path / "train-0.parquet")
    with pytest.raises(BadRow, match="row 0 .*question is"):
        ParquetQuestions(tmp_path)[0]


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path, make_png):
    broken = pa.array([b"yes \xff", b"no"], pa.binary()).view(pa.string())
    image = pa.array([{"bytes": make_png(i), "path": None} for i in range(2)], IMAGE)
    pq.write_table(pa.table({"question": ["?"] * 2, "image": image, "answer": broken}), tmp_path / "train-0.parquet")
    source = ParquetQuestions(tmp_path)
    with pytest.raises(BadRow, match="row 0 .*UTF-8"):
        source[0]
    assert source[1].suffix == source.suffix(1) == "no"


def test_digests_are_kept_until_a_shard_changes(tmp_path, make_png, monkeypatch):
    """They are stored with size and time; the shards are read again if either changes."""
    folder, cache = tmp_path / "data", tmp_path / "cache"
    rows = [("?", {"bytes": make_png(i), "path": "x.png"}, "yes") for i in range(2)]
    write_shards(folder, rows, shards=1)
    reads, read = [], parquet._digest_shards
    monkeypatch.setattr(parquet, "_digest_shards", lambda files: reads.append(files) or read(files))
    sources = [ParquetQuestions(folder, cache=cache) for _ in range(2)]
    assert len(reads) == 1 and sources[0].fingerprint == sources[1].fingerprint
    write_shards(folder, rows[:1] * 2, shards=1)
    changed = ParquetQuestions(folder, cache=cache)
    assert len(reads) == 2 and changed.image_numbers().tolist() == [0, 0]
    assert changed.fingerprint != sources[0].fingerprint


def test_memory_is_bounded_by_the_cache_not_the_data(tmp_path, make_png):
    rows = [(f"{i}?", {"bytes": bytes(10_000), "path": f"{i}.png"}, "no") for i in range(60)]
    source = ParquetQuestions(write_shards(tmp_path, rows), cache_bytes=70_000)
    peak = 0
    for i in range(60):
        source[i]
        peak = max(peak, source._cache.nbytes)
    assert 30_000 < peak <= 70_000  # two groups of three images of 10 kB


def test_a_row_group_is_decoded_once_while_it_is_kept(tmp_path, rows, monkeypatch):
    source = ParquetQuestions(write_shards(tmp_path, rows))
    loads, load = [], source._load
    monkeypatch.setattr(source, "_load", lambda group, columns: loads.append(group) or load(group, columns))
    for _ in range(2):
        for i in range(16):
            source[i]
    assert loads == [0, 1, 2, 3, 4, 5]


def test_prompt_and_fingerprint(tmp_path, rows):
    folder = write_shards(tmp_path, rows)
    plain, prompted = ParquetQuestions(folder), ParquetQuestions(folder, prompt="answer en {question}")
    assert prompted[4].prefix == "answer en Question 4?"
    assert ParquetQuestions(folder).fingerprint == plain.fingerprint != prompted.fingerprint
    other = write_shards(tmp_path / "other", rows[:-1])
    assert ParquetQuestions(other).fingerprint != plain.fingerprint


def test_a_missing_image_is_a_bad_row(tmp_path, rows):
    rows[2] = (rows[2][0], {"bytes": None, "path": "lost.png"}, "yes")
    rows[4] = (rows[4][0], None, "yes")
    source = ParquetQuestions(write_shards(tmp_path, rows))
    for i, name in ((2, "lost.png"), (4, "row 4")):
        with pytest.raises(BadRow, match=name):
            source[i]
    assert source[3].prefix == rows[3][0]


def test_a_damaged_row_group_is_a_bad_row_and_a_cut_file_an_error(tmp_path, rows):
    folder = write_shards(tmp_path, rows, shards=1)
    file = next(folder.rglob("*.parquet"))
    intact, source = file.read_bytes(), ParquetQuestions(folder)
    file.write_bytes(b"PAR1" + bytes(len(intact) // 2) + intact[len(intact) // 2 + 4 :])
    with pytest.raises(BadRow, match="row group 0 of .*train-00000"):
        source[0]
    file.write_bytes(intact[:-20])
    with pytest.raises(UserError, match="no intact parquet"):
        ParquetQuestions(folder)


def test_a_missing_column_is_named(tmp_path):
    pq.write_table(pa.table({"query": ["a"], "image": ["b"]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"lacks \['question', 'answer'\]"):
        ParquetQuestions(tmp_path)


def test_without_pyarrow_the_error_names_the_package(tmp_path, rows, monkeypatch):
    write_shards(tmp_path, rows)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        ParquetQuestions(tmp_path)


def test_threads_and_copies_read_the_same(tmp_path, rows):
    source = ParquetQuestions(write_shards(tmp_path, rows), cache_bytes=1)
    with ThreadPoolExecutor(4) as pool:
        prefixes = list(pool.map(lambda i: source[i % 16].prefix, range(64)))
    assert prefixes == [rows[i % 16][0] for i in range(64)]
    assert pickle.loads(pickle.dumps(source))[5] == source[5]
