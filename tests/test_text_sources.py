"""Texts by the name of their source: files, columns of tables and of data sets."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

import clipmap_hf.data.folders
from clipmap_hf.data.text_sources import read_texts


TITLES = ["red circle", "NA", "007", 'a "big" bar, blue', "red circle", "", "Überraschung"]
DISTINCT = list(dict.fromkeys(title for title in TITLES if title))


@pytest.fixture
def table(tmp_path):
    """Writes the titles as a table, compressed or not."""

    def write(ending: str) -> str:
        path = tmp_path / f"titles{ending}"
        kind = ending.removesuffix(".gz")
        if kind == ".parquet":
            pq.write_table(pa.table({"id": list(range(7)), "title": TITLES}), path)
            return str(path)
        rows = [{"id": index, "title": title} for index, title in enumerate(TITLES)]
        if kind == ".jsonl":
            content = "\n".join(json.dumps(row) for row in rows)
        else:
            separator = {".csv": ",", ".tsv": "\t"}[kind]
            quoted = ['"{}"'.format(title.replace('"', '""')) for title in TITLES]
            content = "\n".join([f"id{separator}title", *(f"{i}{separator}{title}" for i, title in enumerate(quoted))])
        data = content.encode()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
        return str(path)

    return write


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz"])
def test_a_column_of_a_table_gives_its_different_texts_as_they_stand_there(table, ending):
    assert read_texts(f"{table(ending)}:title") == DISTINCT


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(table, ending):
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['id', 'title'\]"):
        read_texts(f"{table(ending)}:text")


def test_a_table_may_be_several_files(table, tmp_path):
    table(".csv")
    (tmp_path / "titles2.csv").write_text("title\nmore\n")
    assert read_texts(f"{tmp_path}/*.csv:title") == [*DISTINCT, "more"]


def test_a_column_of_lists_gives_the_texts_of_all(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"words": ["a", "b"]}\n{"words": ["b", "c"]}\n{"other": 1}\n')
    assert read_texts(f"{tmp_path}/a.jsonl:words") == ["a", "b", "c"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfred circle\r\nblue bar\r\n", b"red circle\n\n  blue bar"])
def test_a_text_file_may_begin_with_a_mark_and_be_compressed(tmp_path, content):
    (tmp_path / "queries.txt").write_bytes(content)
    (tmp_path / "queries.txt.gz").write_bytes(gzip.compress(content))
    for name in ("queries.txt", "queries.txt.gz"):
        assert read_texts(str(tmp_path / name)) == ["red circle", "blue bar"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("queries.txt", "Überraschung".encode("utf-16")),
        ("titles.csv:title", "title\nÜber".encode("latin-1")),
        ("titles.csv:title", b"id,title\n1,a,b,c\n"),
        ("titles.jsonl:title", b'{"title": "a"}\n{"title"'),
        ("titles.parquet:title", b"no parquet"),
    ],
)
def test_a_file_that_is_damaged_or_not_utf8_is_named(tmp_path, name, content):
    (tmp_path / name.split(":")[0]).write_bytes(content)
    with pytest.raises(ValueError, match=f"train_texts='.*{name}' cannot be read as UTF-8 text of its format"):
        read_texts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["queries.txt", "labels:queries.txt", "titles.csv:title", "titles.parquet:title"])
def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"(queries.txt|titles\.\w+)"):
        read_texts(name)


# Columns of data sets


@pytest.fixture
def clone(tmp_path):
    """A data set of two files as it lies on the Hub."""
    folder = tmp_path / "clone" / "data"
    folder.mkdir(parents=True)
    for index, titles in enumerate((TITLES, ["more"])):
        rows = {"image": [b"0"] * len(titles), "title": titles}
        Dataset.from_dict(rows).to_parquet(folder / f"train-{index:05d}-of-00002.parquet")
    return folder.parent


@pytest.fixture
def hub(monkeypatch, clone):
    """`owner/pairs` on a Hub, for which the clone of it stands; the calls of `load_dataset`."""
    calls = []

    def load(name, config, **kwargs):
        calls.append((name, config, kwargs))
        return datasets.load_dataset(str(clone), config, **kwargs)

    builder = clipmap_hf.data.folders.load_dataset_builder
    monkeypatch.setattr(clipmap_hf.data.folders, "load_dataset", load)
    monkeypatch.setattr(
        clipmap_hf.data.folders, "load_dataset_builder", lambda name, config: builder(str(clone), config)
    )
    return calls


def test_a_column_of_a_data_set_on_the_hub_is_streamed_and_nothing_else_of_it(hub):
    assert read_texts("owner/pairs:title") == [*DISTINCT, "more"]
    assert hub == [("owner/pairs", None, {"split": "train", "streaming": True, "columns": ["title"]})]


def test_a_configuration_may_stand_before_the_column(hub):
    assert read_texts("owner/pairs:default:title") == [*DISTINCT, "more"]
    assert hub[0][:2] == ("owner/pairs", "default")


def test_a_column_that_a_data_set_on_the_hub_lacks_is_named(hub):
    with pytest.raises(ValueError, match=r"'owner/pairs' has no column 'text'; it has \['image', 'title'\]"):
        read_texts("owner/pairs:text")


def test_a_column_of_a_folder_is_read_of_its_train_split_or_the_only_one(clone, tmp_path, monkeypatch):
    assert read_texts(f"{clone}:title") == [*DISTINCT, "more"]
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "test.csv").write_text("title\na\nb\n")
    assert read_texts(f"{texts}:title") == ["a", "b"]
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['title'\]"):
        read_texts(f"{texts}:text")
    (texts / "validation.csv").write_text("title\na\nb\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'texts' has the splits \['test', 'validation'\]"):
        read_texts("texts:title")


def test_a_column_of_what_save_to_disk_wrote_is_read(tmp_path):
    Dataset.from_dict({"title": TITLES}).save_to_disk(tmp_path / "saved")
    assert read_texts(f"{tmp_path}/saved:title") == DISTINCT


@pytest.mark.parametrize(("name", "content"), [("Q.TXT", "a\nb\n"), ("T.CSV", "title\na\nb\n")])
def test_extensions_may_be_in_capitals(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_texts(f"{tmp_path / name}:title".removesuffix("" if "title" in content else ":title")) == ["a", "b"]


@pytest.mark.parametrize("line", ['["a", "b"]', '"a"', "3"])
def test_a_line_of_json_without_names_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(f'{{"title": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl' has a line that is no object with columns"):
        read_texts(f"{tmp_path / 'rows.jsonl'}:title")
