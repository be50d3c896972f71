import io
import json
import shutil

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from PIL import Image

from clipmap_hf.data.collate import decoded
from clipmap_hf.data.columns import ERROR_COLUMN, undecoded
from clipmap_hf.data.pairs import load_pairs


def opened(image: dict) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


def assert_same_pairs(pairs, expected: list[dict], caption_column: str = "caption") -> None:
    assert pairs[caption_column] == [row["caption"] for row in expected]
    assert [opened(image).tobytes() for image in pairs["image"]] == [row["image"].tobytes() for row in expected]


@pytest.fixture
def image_folder(tiny_pairs, tmp_path):
    """Images beside a `metadata.jsonl` that lists them with their captions."""
    lines = []
    for index, row in enumerate(tiny_pairs):
        row["image"].save(tmp_path / f"{index:02d}.png")
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "caption": row["caption"]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_parquet_file(pairs_parquet, tiny_pairs):
    pairs = load_pairs(str(pairs_parquet))
    assert pairs.column_names == ["image", "caption"]
    assert_same_pairs(pairs, tiny_pairs)


def test_several_caption_columns_and_keyword_lists(pairs_parquet, tiny_pairs):
    pairs = load_pairs(str(pairs_parquet), caption_columns=["keywords", "caption"])
    assert pairs.column_names == ["image", "keywords", "caption"]
    assert pairs["keywords"] == [row["keywords"] for row in tiny_pairs]


def test_glob_of_parquet_files_in_order_of_their_names(pairs_parquet, tiny_pairs, tmp_path):
    first = load_pairs(str(pairs_parquet)).select(range(3))
    second = load_pairs(str(pairs_parquet)).select(range(3, 5))
    second.to_parquet(tmp_path / "b.parquet")
    first.to_parquet(tmp_path / "a.parquet")
    assert_same_pairs(load_pairs(str(tmp_path / "*.parquet")), tiny_pairs[:5])


def test_webdataset_tar(pairs_tar, tiny_pairs):
    pairs = load_pairs(str(pairs_tar), image_column="png", caption_columns=["txt"])
    assert pairs.column_names == ["image", "txt", ERROR_COLUMN] and set(pairs[ERROR_COLUMN]) == {None}
    assert_same_pairs(pairs, tiny_pairs, "txt")


def test_glob_of_webdataset_tars(pairs_tar, tmp_path):
    for name in ("0.tar", "1.tar"):
        shutil.copy(pairs_tar, tmp_path / name)
    assert len(load_pairs(str(tmp_path / "*.tar"), image_column="png", caption_columns=["txt"])) == 48


def test_image_folder_with_metadata(image_folder, tiny_pairs):
    assert_same_pairs(load_pairs(str(image_folder)), tiny_pairs)


def test_images_stay_undecoded(pairs_parquet, pairs_tar, image_folder):
    for source, columns in (
        (pairs_parquet, {}),
        (pairs_tar, {"image_column": "png", "caption_columns": ["txt"]}),
        (image_folder, {}),
    ):
        image = load_pairs(str(source), **columns)[0]["image"]
        assert set(image) == {"bytes", "path"}


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No file matches .*nothing-\*\.parquet"):
        load_pairs(str(tmp_path / "nothing-*.parquet"))


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_a_folder_without_images_is_named(tmp_path, make):
    folder = tmp_path / "no-images-here"
    if make:
        folder.mkdir()
    with pytest.raises((ValueError, OSError), match="no-images-here"):
        load_pairs(str(folder))


def test_a_file_of_another_kind_is_an_error(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"pairs\.csv' is neither a folder nor one of \['\.parquet', '\.tar', "):
        load_pairs(str(path))


def test_missing_columns_are_named_beside_those_there_are(pairs_parquet):
    with pytest.raises(ValueError, match=r"no column \['photo', 'text'\]; it has \['image', 'caption', 'keywords'\]"):
        load_pairs(str(pairs_parquet), image_column="photo", caption_columns=["caption", "text"])


def test_a_missing_split_of_a_folder_is_named(image_folder):
    with pytest.raises(ValueError, match="test"):
        load_pairs(str(image_folder), split="test")


# Streams


@pytest.fixture(params=["parquet", "glob of parquet", "tar", "glob of tars", "image folder"])
def source(request, pairs_parquet, pairs_tar, image_folder, tmp_path) -> tuple[str, dict]:
    """A source of `tiny_pairs`, once or twice over, and the arguments that it needs."""
    copies = tmp_path / "copies"
    copies.mkdir()
    if "tar" in request.param:
        path, columns = pairs_tar, {"image_column": "png", "caption_columns": ["txt"]}
    else:
        path, columns = pairs_parquet, {"caption_columns": ["keywords", "caption"]}
    if request.param == "image folder":
        return str(image_folder), {}
    if "glob" in request.param:
        for name in "ab":
            shutil.copy(path, copies / f"{name}{path.suffix}")
        return str(copies / f"*{path.suffix}"), columns
    return str(path), columns


def test_a_stream_has_the_rows_of_the_data_set(source):
    name, columns = source
    pairs, stream = load_pairs(name, **columns), load_pairs(name, **columns, streaming=True)
    assert isinstance(pairs, Dataset) and isinstance(stream, IterableDataset)
    assert stream.column_names == pairs.column_names and stream.features == pairs.features
    rows, streamed = list(pairs), list(stream)
    assert len(rows) in (24, 48) and set(rows[0]["image"]) == {"bytes", "path"}
    pixels = [[opened(row.pop("image")).tobytes() for row in some] for some in (rows, streamed)]
    assert pixels[0] == pixels[1] and rows == streamed
    assert list(stream) != [] and len(list(stream)) == len(rows)  # it can be read again


def test_several_files_are_as_many_shards(pairs_parquet, tmp_path):
    for name in ("0.parquet", "1.parquet", "2.parquet"):
        shutil.copy(pairs_parquet, tmp_path / name)
    assert load_pairs(str(tmp_path / "*.parquet"), streaming=True).num_shards == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_named_in_streams_too(source, streaming):
    with pytest.raises(ValueError, match=r"no column \['photo', 'text'\]; it has \["):
        load_pairs(source[0], image_column="photo", caption_columns=["text"], streaming=streaming)


def test_files_have_no_split_but_train(pairs_parquet, pairs_tar):
    for source in (pairs_parquet, pairs_tar):
        with pytest.raises(ValueError, match="split='test': plain files .* only the split 'train'"):
            load_pairs(str(source), split="test")


def test_parquet_files_can_be_sliced_and_tars_and_streams_cannot(pairs_parquet, pairs_tar):
    parts = [load_pairs(str(pairs_parquet), split=part)["caption"] for part in ("train[:75%]", "train[75%:]")]
    assert [len(part) for part in parts] == [18, 6]
    assert [*parts[0], *parts[1]] == load_pairs(str(pairs_parquet))["caption"][:]
    sum_of_slices = load_pairs(str(pairs_parquet), split="train[:2]+train[-1:]")["caption"][:]
    assert sum_of_slices == [*parts[0][:2], parts[1][-1]]
    for source, streaming in ((pairs_tar, False), (pairs_parquet, True)):
        with pytest.raises(ValueError, match="are read as a whole; take split='train'"):
            load_pairs(str(source), split="train[:75%]", streaming=streaming)


# Pairs that were loaded elsewhere


@pytest.mark.parametrize("streaming", [False, True])
def test_of_loaded_pairs_the_columns_that_are_read_are_kept(pairs_parquet, tiny_pairs, streaming):
    loaded = load_dataset("parquet", data_files=str(pairs_parquet), split="train", streaming=streaming)
    loaded = loaded.rename_column("image", "photo")
    pairs = undecoded(loaded, "these", "photo", ["caption"])
    rows = list(pairs)
    assert pairs.column_names == ["image", "caption"] and list(rows[0]) == ["image", "caption"]
    assert [opened(row["image"]).tobytes() for row in rows] == [row["image"].tobytes() for row in tiny_pairs]
    assert undecoded(loaded, "these", "photo", []).column_names == ["image"]
    with pytest.raises(ValueError, match=r"these has no column \['image', 'text'\]; it has \['photo', 'caption', "):
        undecoded(loaded, "these", "image", ["caption", "text"])


def test_loaded_pairs_whose_columns_are_unknown_are_an_error():
    unknown = IterableDataset.from_generator(lambda: iter([{"image": None}]))
    with pytest.raises(ValueError, match="columns of these are unknown until it is read"):
        undecoded(unknown, "these", "image", [])


def test_a_list_of_pairs_has_images_in_any_form(tiny_pairs, pairs_parquet, tmp_path):
    image = tiny_pairs[0]["image"]
    image.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    forms = [image, content, str(tmp_path / "image.png"), tmp_path / "image.png"]
    rows = load_pairs([(form, f"text {index}") for index, form in enumerate(forms)])
    assert rows["caption"] == [f"text {index}" for index in range(4)]
    for row in rows:
        assert np.array_equal(np.asarray(decoded(row)[1]), np.asarray(image))


def test_a_list_of_pairs_may_have_several_captions_each(tiny_pairs):
    rows = load_pairs([(tiny_pairs[0]["image"], ["one", "two"]), (tiny_pairs[1]["image"], ["three"])])
    assert rows["caption"] == [["one", "two"], ["three"]]


def test_what_a_program_holds_is_read_as_a_file_is(pairs_parquet):
    rows = Dataset.from_parquet(str(pairs_parquet))
    for given in (rows, DatasetDict(test=rows), pairs_parquet):
        assert load_pairs(given).to_list() == load_pairs(str(pairs_parquet)).to_list()


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ([], ValueError, "an empty list; give at least one pair"),
        ([1, 2], TypeError, "Data of the type list cannot be read"),
        (DatasetDict(), ValueError, r"has the splits \[\]"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(source, error, words):
    with pytest.raises(error, match=words):
        load_pairs(source)
