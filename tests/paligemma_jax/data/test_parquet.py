import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_jax.data.parquet import ParquetQuestions
from paligemma_jax.data.records import BadRow
from train_jax.errors import UserError

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
    """Two questions on each image."""
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


def test_only_the_split_asked_for_is_read(tmp_path, rows):
    write_shards(tmp_path, rows)
    write_shards(tmp_path, rows[:3], shards=1, split="validation")
    assert len(ParquetQuestions(tmp_path, "validation")) == 3
    with pytest.raises(UserError, match=r"no test-\*\.parquet"):
        ParquetQuestions(tmp_path, "test")


@pytest.mark.parametrize("image_type", [IMAGE, pa.struct([("bytes", pa.binary())])])
def test_images_without_a_path_are_images_of_their_own(tmp_path, make_png, image_type):
    rows = [(f"{i}?", {"bytes": make_png(0), "path": None}, "yes") for i in range(5)]
    source = ParquetQuestions(write_shards(tmp_path, rows, image_type=image_type))
    assert [source[i].image_index for i in range(5)] == list(range(5))
    assert source[3].image_name == "row 3"


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
    monkeypatch.setattr(source, "_load", lambda group: loads.append(group) or load(group))
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


def test_missing_answer_is_empty_and_missing_image_a_bad_row(tmp_path, rows):
    rows[1] = (rows[1][0], rows[1][1], None)
    rows[2] = (rows[2][0], {"bytes": None, "path": "lost.png"}, "yes")
    rows[4] = (rows[4][0], None, "yes")
    source = ParquetQuestions(write_shards(tmp_path, rows))
    assert source[1].suffix == ""
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
