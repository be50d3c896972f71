import gzip
import io
import logging
import os
import random
import tarfile
from pathlib import Path

import pytest
from datasets import IterableDataset

from clipmap_hf.data.captions import filled_texts
from clipmap_hf.data.columns import ERROR_COLUMN
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.tar_shards import member_key, shard_rows


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs_of(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of rows whose images have 3,000 bytes, that is six blocks of a tar."""
    members = []
    for index in range(start, start + count):
        members += [(f"{index:03d}.jpg", b"%03d" % index * 1000), (f"{index:03d}.txt", b"caption %d" % index)]
    return members


def rows_of(*paths: Path, columns: tuple[str, ...] = ("txt",)) -> list[dict]:
    return list(shard_rows([(str(path), 0, 0) for path in paths], "jpg", columns))


def captions_and_errors(rows: list[dict]) -> list[str | None]:
    return [row[ERROR_COLUMN] or row["txt"] for row in rows]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a/b.c/000.seg.PNG", ("a/b.c/000", "seg.png")),
        ("./000.jpg", ("./000", "jpg")),
        ("a/.DS_Store", ("", "ds_store")),
        ("._000.jpg", ("", "_000.jpg")),
        ("README", ("README", "")),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_base_name(name, expected):
    assert member_key(name) == expected


def test_rows_of_several_tars(tmp_path):
    paths = [write_tar(tmp_path / f"{index}.tar", pairs_of(2, 2 * index)) for index in range(2)]
    rows = rows_of(*paths)
    assert [row["txt"] for row in rows] == [f"caption {index}" for index in range(4)]
    assert [row["image"]["bytes"][:3] for row in rows] == [b"%03d" % index for index in range(4)]
    assert rows[0]["image"]["path"] == f"{paths[0]}::000"
    assert {row[ERROR_COLUMN] for row in rows} == {None}


def test_members_are_grouped_by_folder_and_key_and_other_columns_are_left_out(tmp_path):
    members = [
        ("a/0.jpg", b"a"),
        ("a/0.json", b"{}"),
        ("a/0.TXT", b"in a"),
        ("b/0.txt", b"in b"),
        ("b/.hidden", b""),
        ("b/0.Jpg", b"b"),
    ]
    rows = rows_of(write_tar(tmp_path / "0.tar", members))
    assert [(row["image"]["bytes"], row["txt"]) for row in rows] == [(b"a", "in a"), (b"b", "in b")]
    assert set(rows[0]) == {"image", "txt", ERROR_COLUMN}


def test_columns_are_found_whatever_their_case(tmp_path):
    write_tar(tmp_path / "0.tar", pairs_of(2))
    pairs = load_pairs(str(tmp_path / "*.tar"), image_column="JPG", caption_columns=["Txt"])
    assert pairs.column_names == ["image", "Txt", ERROR_COLUMN] and pairs["Txt"] == ["caption 0", "caption 1"]


def test_text_that_is_not_utf_8_is_kept(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"0"), ("0.txt", "naïve".encode() + b"\xff")])
    assert rows_of(path)[0]["txt"] == "naïve\ufffd"


def test_what_a_group_lacks_is_none(tmp_path):
    members = [("0.jpg", b"0"), ("1.txt", b"one"), ("2.json", b"{}"), ("3.jpg", b"3"), ("3.txt", b"")]
    write_tar(tmp_path / "0.tar", members)
    expected = [(b"0", None), (None, "one"), (None, None), (b"3", "")]
    for streaming in (False, True):
        pairs = load_pairs(str(tmp_path / "0.tar"), image_column="jpg", caption_columns=["txt"], streaming=streaming)
        assert [(row["image"] and row["image"]["bytes"], row["txt"]) for row in pairs] == expected


def test_a_column_that_comes_again_begins_another_row(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"a"), ("0.txt", b"a"), ("0.jpg", b"b"), ("0.txt", b"b")])
    assert [row["txt"] for row in rows_of(path)] == ["a", "b"]


def test_a_local_file_of_a_members_name_does_not_replace_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("000.jpg").write_bytes(b"another image")
    write_tar(Path("0.tar"), pairs_of(1))
    for streaming in (False, True):
        pairs = load_pairs("0.tar", image_column="jpg", caption_columns=["txt"], streaming=streaming)
        assert next(iter(pairs))["image"]["bytes"] == b"000" * 1000


# Broken tars

ROW = 512 + 3072 + 512 + 512  # bytes of a row of `pairs_of`


@pytest.mark.parametrize(
    ("end", "whole"),
    [
        (2 * ROW, 2),
        (2 * ROW + 100, 2),
        (2 * ROW + 512, 2),
        (2 * ROW + 1000, 2),
        (2 * ROW + 512 + 3072, 2),
        (3 * ROW - 510, 2),
        (3 * ROW - 500, 3),
        (100, 0),
        (0, 0),
    ],
    ids=["between rows", "header", "after a header", "image", "after an image", "text", "padding", "first", "empty"],
)
def test_a_cut_tar_loses_its_rest_and_says_so(tmp_path, caplog, end, whole):
    first = write_tar(tmp_path / "first.tar", pairs_of(4))
    first.write_bytes(first.read_bytes()[:end])
    second = write_tar(tmp_path / "second.tar", pairs_of(1, 9))
    with caplog.at_level(logging.WARNING):
        rows = rows_of(first, second)
    assert captions_and_errors(rows) == [f"caption {i}" for i in range(whole)] + ["truncated shard", "caption 9"]
    assert rows[whole]["image"] is None and rows[whole]["txt"] is None
    assert str(first) in caplog.text and str(second) not in caplog.text


def test_a_file_that_is_no_tar_is_a_truncated_shard(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>404 Not Found</html>" * 100)
    assert captions_and_errors(rows_of(tmp_path / "0.tar")) == ["truncated shard"]


def test_an_overwritten_header_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs_of(4))
    content = bytearray(path.read_bytes())
    content[2 * ROW : 2 * ROW + 512] = b"x" * 512
    path.write_bytes(content)
    assert captions_and_errors(rows_of(path)) == ["caption 0", "caption 1", "truncated shard"]


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_compressed_tars_are_read_too(tmp_path, cut):
    content = gzip.compress(write_tar(tmp_path / "plain.tar", pairs_of(300)).read_bytes())
    path = tmp_path / "0.tar.gz"
    path.write_bytes(content[: len(content) // 2] if cut else content)
    rows = captions_and_errors(rows_of(path))
    assert rows[:50] == [f"caption {i}" for i in range(50)]
    assert (rows[-1] == "truncated shard" and len(rows) < 300) if cut else len(rows) == 300


def test_a_tar_without_rows_says_so(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("README", b"nothing here")])
    assert captions_and_errors(rows_of(path)) == ["empty shard"]


def test_a_file_that_is_gone_says_so(tmp_path, caplog):
    assert captions_and_errors(rows_of(tmp_path / "gone.tar")) == ["unreadable shard"]
    assert "gone.tar" in caplog.text


def test_no_mutation_of_a_tar_ends_a_run(tmp_path):
    rng = random.Random(0)
    whole = write_tar(tmp_path / "0.tar", pairs_of(3)).read_bytes()
    compressed, path, errors = gzip.compress(whole), tmp_path / "mutated.tar", 0
    for number in range(400):
        content = bytearray(compressed if number % 4 == 0 else whole)
        for _ in range(rng.choice((1, 4, 16))):
            place = rng.randrange(len(content)) if rng.random() < 0.3 else ROW * rng.randrange(3) + rng.randrange(512)
            content[place % len(content)] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        errors += any(row[ERROR_COLUMN] for row in rows_of(path))
    assert errors > 200


# As data sets


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_shard_is_a_row_of_the_data_set(tmp_path, streaming):
    first = write_tar(tmp_path / "0.tar", pairs_of(4))
    first.write_bytes(first.read_bytes()[: ROW + 1000])
    write_tar(tmp_path / "1.tar", pairs_of(1, 9))
    pairs = load_pairs(str(tmp_path / "*.tar"), image_column="jpg", caption_columns=["txt"], streaming=streaming)
    assert captions_and_errors(list(pairs)) == ["caption 0", "truncated shard", "caption 9"]


def test_a_changed_tar_is_read_again(tmp_path):
    def captions() -> list[str]:
        return load_pairs(str(path), image_column="jpg", caption_columns=["txt"])["txt"][:]

    path = write_tar(tmp_path / "0.tar", pairs_of(2))
    stat = path.stat()
    assert captions() == ["caption 0", "caption 1"]
    write_tar(path, pairs_of(2, 5))  # of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert captions() == ["caption 5", "caption 6"]


def test_a_stream_has_a_shard_per_file(tmp_path):
    for count in (1, 3):
        write_tar(tmp_path / f"{count}.tar", pairs_of(count))
    load = {"image_column": "jpg", "caption_columns": ["txt"], "streaming": True}
    assert load_pairs(str(tmp_path / "1.tar"), **load).num_shards == 1
    pairs = load_pairs(str(tmp_path / "*.tar"), **load)
    assert isinstance(pairs, IterableDataset) and pairs.num_shards == 2
    assert pairs.column_names == ["image", "txt", ERROR_COLUMN]
    assert len(list(pairs.shard(2, 1))) == 3


def test_columns_are_looked_for_in_the_first_readable_tar(tmp_path):
    (tmp_path / "0.tar").touch()
    write_tar(tmp_path / "1.tar", [("0.jpg", b"0"), *pairs_of(3)])
    source = str(tmp_path / "*.tar")
    assert load_pairs(source, image_column="jpg", caption_columns=["txt"]).num_rows == 5
    with pytest.raises(ValueError, match=r"1\.tar' has no column \['png', 'cap'\]; it has \['jpg', 'txt'\]"):
        load_pairs(source, image_column="png", caption_columns=["txt", "cap"])


def test_tars_without_any_row_are_an_error(tmp_path):
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"None of the 2 tars holds a file such as 000\.jpg; the first is .*0\.tar"):
        load_pairs(str(tmp_path / "*.tar"), image_column="jpg", caption_columns=["txt"])


def test_lines_of_a_text_are_captions(tmp_path, tiny_pairs):
    png = io.BytesIO()
    tiny_pairs[0]["image"].save(png, "PNG")
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        texts = [b"a cat\n\n a dog \n", b"one\n"]
        files = {
            f"{i}.{kind}": content for i in (0, 1) for kind, content in (("png", png.getvalue()), ("txt", texts[i]))
        }
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = list(load_pairs(str(tmp_path / "pairs.tar"), image_column="png", caption_columns=["txt"]))
    assert [filled_texts(row["txt"]) for row in rows] == [["a cat", "a dog"], ["one\n"]]
