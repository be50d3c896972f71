"""Where data lies: clones of data sets, saved data sets, archives, folders of images alone, shards that differ."""

import gzip
import io
import json
import logging
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

import clipmap_hf.data.folders
from clipmap_hf import ClipMapCompressor
from clipmap_hf.data.calibration_pairs import CalibrationPairs, calibration_rows, sampled_pairs
from clipmap_hf.data.captions import filled_texts
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.images import BadRowError, decode_image, image_bytes
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.files.hub_ids import check_hub_id
from clipmap_hf.models.loading import load_model


def png(color: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(content, "PNG")
    return content.getvalue()


def colors(pairs) -> list[tuple[int, int, int]]:
    return [decode_image(image_bytes(row["image"])).getpixel((0, 0)) for row in pairs]


RED, BLUE = (255, 0, 0), (0, 0, 255)
ROWS = {"image": [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}], "caption": ["r", "b"]}
FEATURES = Features({"image": ImageFeature(), "caption": Value("string")})


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict(ROWS, features=FEATURES)


@pytest.fixture(params=[False, True], ids=["table", "stream"])
def streaming(request) -> bool:
    return request.param


# Folders that hold a data set


@pytest.fixture
def clone(rows, tmp_path):
    """What `git clone` of a data set on the Hub leaves: a card, and parquet files by split in `data/`."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        for shard, part in enumerate((rows.select([0]), rows.select([1]))):
            part.to_parquet(tmp_path / "data" / f"{split}-{shard:05d}-of-00002.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Pairs\n")
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_clone_of_a_data_set_is_read_as_datasets_reads_it(clone, split, streaming):
    pairs = load_pairs(str(clone), split=split, streaming=streaming)
    assert [row["caption"] for row in pairs] == load_dataset(str(clone), split=split)["caption"][:]
    assert colors(pairs) == [RED, BLUE]


def test_a_slice_of_a_clone_is_read(clone):
    assert load_pairs(str(clone), split="train[1:]")["caption"][:] == ["b"]


def test_a_split_that_a_clone_lacks_is_named(clone):
    with pytest.raises(ValueError, match="validation"):
        load_pairs(str(clone), split="validation")


@pytest.fixture
def configs(rows, tmp_path):
    """A clone with two configurations, which its card names."""
    for name, part in (("small", rows.select([0])), ("large", rows)):
        (tmp_path / name).mkdir()
        part.to_parquet(tmp_path / name / "train.parquet")
    lines = [f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("small", "large")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    return tmp_path


def test_one_of_several_configurations_is_named_after_a_colon(configs, streaming):
    assert [row["caption"] for row in load_pairs(f"{configs}:small", streaming=streaming)] == ["r"]
    assert [row["caption"] for row in load_pairs(f"{configs}:large", streaming=streaming)] == ["r", "b"]


@pytest.mark.parametrize("config", ["", ":medium"])
def test_without_one_of_its_configurations_a_data_set_is_an_error_that_lists_them(configs, config):
    with pytest.raises(ValueError, match=r"configurations \['small', 'large'\]; name one of them: '.*:small'"):
        load_pairs(f"{configs}{config}")


def test_a_saved_data_set_is_read(rows, tmp_path, streaming):
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "val": rows.select([1])}).save_to_disk(tmp_path / "splits")
    for name, split, expected in (("one", "train", "rb"), ("splits", "val", "b"), ("splits", "train[:50%]", "r")):
        pairs = load_pairs(str(tmp_path / name), split=split, streaming=streaming)
        assert isinstance(pairs, IterableDataset) == streaming
        assert "".join(row["caption"] for row in pairs) == expected
    assert colors(load_pairs(str(tmp_path / "one"), streaming=streaming)) == [RED, BLUE]
    with pytest.raises(ValueError, match=r"split='test' .*it has \['train', 'val'\]"):
        load_pairs(str(tmp_path / "splits"), split="test")


def test_a_folder_of_tars_is_read_by_the_names_of_its_splits(tmp_path, streaming):
    for name, color in (("train-0", "red"), ("train-1", "blue"), ("test-0", "red")):
        write_tar(tmp_path / f"{name}.tar", {"0.png": png(color), "0.txt": color.encode()})
    columns = {"caption_columns": ["txt"], "streaming": streaming}
    assert [row["txt"] for row in load_pairs(str(tmp_path), **columns)] == ["red", "blue"]
    assert [row["txt"] for row in load_pairs(str(tmp_path), split="test", **columns)] == ["red"]


def write_tar(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_data_set_may_have_a_column_that_is_called_error(rows, tmp_path):
    rows.add_column("error", [None, "x"]).save_to_disk(tmp_path / "saved")
    pairs = load_pairs(str(tmp_path / "saved"))
    assert pairs.column_names == ["image", "caption"] and colors(pairs) == [RED, BLUE]


def test_splits_of_saved_data_and_of_a_clone_may_be_added(rows, clone, tmp_path):
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    assert load_pairs(str(tmp_path / "saved"), split="train+test")["caption"][:] == ["r", "b", "b"]
    assert load_pairs(str(clone), split="train[:1]+test[1:]")["caption"][:] == ["r", "b"]


def test_saved_shards_are_shards_of_a_stream(rows, tmp_path):
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    assert load_pairs(str(tmp_path / "saved"), streaming=True).num_shards == 2


def test_a_folder_of_lines_that_name_images_is_read_as_datasets_reads_it(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "red.bin"
    path.write_bytes(png("red"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text(json.dumps({"image": str(path), "caption": "r"}) + "\n")
    pairs = load_pairs(str(tmp_path / "lines"))
    assert pairs["caption"][:] == ["r"] and colors(pairs) == [RED]


@pytest.mark.parametrize("layout", ["tgz", "img2dataset"])
def test_tars_that_datasets_would_not_read_in_a_folder_are_read(tmp_path, layout):
    if layout == "tgz":
        write_tar(tmp_path / "0.tar", {"0.jpg": png("red"), "0.txt": b"r"})
        (tmp_path / "0.tgz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
        (tmp_path / "0.tar").unlink()
    else:
        for shard in ("00000", "00001"):
            write_tar(tmp_path / f"{shard}.tar", {"0.jpg": png("red"), "0.txt": b"r"})
            pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"{shard}.parquet")
            (tmp_path / f"{shard}_stats.json").write_text("{}")
    pairs = load_pairs(str(tmp_path), caption_columns=["txt"])
    assert set(pairs["txt"]) == {"r"} and colors(pairs)[0] == RED


# Images in archives and on file systems


def test_images_of_a_zip_beside_their_captions_are_read(tmp_path, streaming):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for color in ("red", "blue"):
            archive.writestr(f"{color}.png", png(color))
        lines = [json.dumps({"file_name": f"{color}.png", "caption": color}) for color in ("red", "blue")]
        archive.writestr("metadata.jsonl", "\n".join(lines))
    pairs = load_pairs(str(tmp_path), streaming=streaming)
    assert [row["caption"] for row in pairs] == ["red", "blue"]
    assert colors(pairs) == [RED, BLUE]


def test_an_image_is_read_from_any_file_system_that_its_path_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/red.png", png("red"))
    assert image_bytes({"bytes": None, "path": f"zip://in/red.png::{tmp_path}/a.zip"}) == png("red")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:60])
    for path in (f"zip://no.png::{tmp_path}/a.zip", f"zip://a.png::{tmp_path}/cut.zip", "nosuch://a.png"):
        with pytest.raises(BadRowError, match="unreadable image"):
            image_bytes({"bytes": None, "path": path})


# Images alone


@pytest.mark.parametrize("labels", [False, True], ids=["flat", "by class"])
def test_a_folder_of_images_without_captions_is_enough_to_calibrate(tmp_path, tiny_processor, labels, caplog):
    for color in ("red", "blue"):
        folder = tmp_path / color if labels else tmp_path
        folder.mkdir(exist_ok=True)
        (folder / f"{color}.png").write_bytes(png(color))
    with caplog.at_level(logging.WARNING):
        rows = calibration_rows(str(tmp_path), image_column="image", caption_column="caption")
    assert "images alone" in caplog.text
    (batch,) = CalibrationPairs(rows, tiny_processor, 8, caption_column=None)
    assert batch["pixel_values"].shape[0] == 2 and "input_ids" not in batch


def test_tars_of_images_alone_are_enough_to_calibrate(tmp_path, streaming):
    write_tar(tmp_path / "a.tar", {"0.jpg": png("red"), "1.png": png("blue")})
    rows = calibration_rows(
        str(tmp_path / "a.tar"), image_column="image", caption_column="caption", streaming=streaming
    )
    assert colors(rows) == [RED, BLUE]


def test_python_calibrates_on_images_alone_too(tmp_path, tiny_processor):
    (tmp_path / "red.png").write_bytes(png("red"))
    views = list(sampled_pairs(str(tmp_path), tiny_processor, 8))
    assert [len(batch["pixel_values"]) for batch in views] == [1] * 8 and "input_ids" not in views[-1]


def test_data_with_other_texts_must_name_them_to_calibrate(rows, tmp_path):
    rows.rename_column("caption", "text").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column \['caption'\]; it has \['image', 'text'\]"):
        calibration_rows(str(tmp_path / "a.parquet"), image_column="image", caption_column="caption")


def test_the_column_image_of_a_tar_is_all_that_images_have(tmp_path, streaming):
    names = ["0.jpg", "1.PNG", "2.jpeg", "3.webp"]
    files = {name: png("red") for name in names} | {f"{i}.txt": str(i).encode() for i in range(4)}
    write_tar(tmp_path / "a.tar", dict(sorted(files.items())))
    pairs = load_pairs(str(tmp_path / "a.tar"), caption_columns=["txt"], streaming=streaming)
    assert [row["txt"] for row in pairs] == ["0", "1", "2", "3"]
    assert colors(pairs) == [RED] * 4


def test_of_several_images_of_a_row_in_a_tar_the_first_is_taken(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": png("red"), "0.png": png("blue"), "0.txt": b"a", "1.png": png("blue")})
    pairs = load_pairs(str(tmp_path / "a.tar"), caption_columns=["txt"])
    assert colors(pairs) == [RED, BLUE] and pairs["txt"][:] == ["a", None]


# Shards that differ


def write_shards(folder, *columns: dict) -> str:
    for index, one in enumerate(columns):
        pq.write_table(pa.table(one), folder / f"{index}.parquet")
    return str(folder / "*.parquet")


IMAGE = [{"bytes": png("red"), "path": None}]


def test_shards_may_differ_in_columns_that_nobody_asked_for(tmp_path, streaming):
    shards = write_shards(
        tmp_path,
        {"image": IMAGE, "caption": ["a"], "score": [1]},
        {"caption": ["b"], "image": IMAGE, "score": ["high"], "url": ["x"]},
        {"image": [png("blue")], "caption": pa.array(["c"], pa.large_string())},
    )
    pairs = load_pairs(shards, streaming=streaming)
    assert [row["caption"] for row in pairs] == ["a", "b", "c"]
    assert colors(pairs) == [RED, RED, BLUE] and set(pairs.column_names) == {"image", "caption"}


def test_captions_that_are_strings_in_one_shard_and_lists_in_another_are_read(tmp_path, streaming):
    shards = write_shards(
        tmp_path,
        {"image": IMAGE * 3, "caption": ["a", None, "b"]},
        {"image": IMAGE * 2, "caption": [["c", "d"], []]},
        {"image": IMAGE, "caption": pa.array([None], pa.string())},
    )
    pairs = load_pairs(shards, streaming=streaming)
    texts = [row["caption"] and filled_texts(row["caption"]) for row in pairs]
    assert [text or [] for text in texts] == [["a"], [], ["b"], ["c", "d"], [], []]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.array([None], pa.null()), pa.array(["a"]), Value("string")),
        (pa.array([[]], pa.list_(pa.null())), pa.array([["a"]]), List(Value("string"))),
        (pa.array([["a"]]), pa.array(["b"], pa.large_string()), List(Value("string"))),
        (pa.array([["a"]], pa.large_list(pa.string())), pa.array(["b"]), List(Value("string"))),
        (pa.array(["a"]), pa.array(["b"]).dictionary_encode(), Value("string")),
        (pa.array([["a"]]), pa.array([None], pa.null()), List(Value("string"))),
    ],
    ids=["null", "empty lists", "large strings", "large lists", "dictionary", "lists and null"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_texts_of_shards_are_read_in_any_arrow_type(tmp_path, first, second, kind, turned, streaming):
    columns = [{"image": IMAGE, "caption": column} for column in (first, second)]
    pairs = load_pairs(write_shards(tmp_path, *columns[:: -1 if turned else 1]), streaming=streaming)
    assert pairs.features["caption"] == kind
    texts = [row["caption"] for row in pairs]
    assert sum(bool(text and filled_texts(text)) for text in texts) == sum(
        bool(c.to_pylist()[0]) for c in (first, second)
    )


def test_shards_whose_captions_are_no_texts_in_one_are_an_error_that_says_so(tmp_path):
    shards = write_shards(tmp_path, {"image": IMAGE, "caption": [7]}, {"image": IMAGE, "caption": ["a"]})
    with pytest.raises(ValueError, match=r"Column 'caption' holds .*int64.* in one file and .*string.* in another"):
        load_pairs(shards)


def test_a_column_of_a_type_that_datasets_does_not_know_is_not_looked_at(tmp_path):
    odd = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    assert len(load_pairs(write_shards(tmp_path, {"image": IMAGE, "caption": ["a"], "odd": odd}))) == 1


def test_class_names_that_a_card_or_another_shard_gives_are_known(tmp_path):
    (tmp_path / "data").mkdir()
    labels = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    for index, features in enumerate((None, labels)):
        rows = Dataset.from_dict({"image": IMAGE, "label": [index]}, features=features)
        rows.to_parquet(tmp_path / "data" / f"train-{index}.parquet")
    pairs = load_pairs(str(tmp_path / "data" / "*.parquet"), caption_columns=["label"])
    assert pairs.features["label"].names == ["cat", "dog"] and pairs["label"][:] == [0, 1]
    (tmp_path / "data" / "train-1.parquet").unlink()
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': cat\n          '1': dog\n  splits:\n  - name: train\n"
        "    num_examples: 1\n---\n"
    )
    expected = load_dataset(str(tmp_path), split="train").features["label"]
    assert load_pairs(str(tmp_path), caption_columns=["label"]).features["label"] == expected == labels["label"]


def test_a_slice_of_shards_that_differ_is_read(tmp_path):
    shards = write_shards(
        tmp_path, {"image": IMAGE * 2, "caption": ["a", "b"]}, {"image": IMAGE * 2, "caption": [["c"], ["d"]]}
    )
    assert load_pairs(shards, split="train[1:3]")["caption"][:] == [["b"], ["c"]]


def test_a_shard_that_lacks_a_column_is_named(tmp_path):
    shards = write_shards(tmp_path, {"image": IMAGE, "caption": ["a"]}, {"image": IMAGE, "text": ["a"]})
    with pytest.raises(ValueError, match=r"1\.parquet' has no column \['caption'\]; it has \['image', 'text'\]"):
        load_pairs(shards)


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    shards = write_shards(tmp_path, {"image": IMAGE, "caption": ["a"]}, {"image": IMAGE, "caption": ["a"]})
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1\.parquet' is no parquet file, or is cut off"):
        load_pairs(shards)


def test_a_parquet_file_whose_name_looks_like_a_glob_is_read(rows, tmp_path):
    rows.to_parquet(tmp_path / "pairs[1].parquet")
    assert load_pairs(str(tmp_path / "pairs[1].parquet"))["caption"][:] == ["r", "b"]


def test_extensions_may_be_capitals_and_the_folder_the_one_at_hand(rows, tmp_path, monkeypatch):
    rows.to_parquet(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    assert load_pairs(".")["caption"][:] == ["r", "b"]
    (tmp_path / "a.parquet").rename(tmp_path / "A.PARQUET")
    assert load_pairs("A.PARQUET")["caption"][:] == ["r", "b"]


def test_a_changed_shard_is_read_again(rows, tmp_path):
    for part in (rows.select([0]), rows):
        part.to_parquet(tmp_path / "a.parquet")
        assert len(load_pairs(str(tmp_path / "a.parquet"))) == len(part)


@pytest.mark.parametrize(
    "images",
    [
        [IMAGE, IMAGE],
        [["a.png"], ["b.png"]],
        [[b"x"], [b"y"]],
        [1, 2],
        [1.5, None],
    ],
    ids=["list of images", "list of paths", "list of bytes", "numbers", "floats"],
)
def test_an_image_column_of_anything_else_is_refused_by_its_type(tmp_path, images):
    path = write_shards(tmp_path, {"image": images, "caption": ["a", "b"]})
    with pytest.raises(ValueError, match=r"Column 'image' of .* holds .* an image a row is needed"):
        load_pairs(path)
    loaded = Dataset.from_dict({"image": images, "caption": ["a", "b"]})
    with pytest.raises(ValueError, match=r"Column 'image' of The data holds .* an image a row is needed"):
        load_pairs(loaded)


def test_an_image_column_of_arrays_is_read():
    pixels = [[[[255, 0, 0]] * 8] * 6]
    pairs = Dataset.from_dict(
        {"image": pixels, "caption": ["a"]},
        features=Features({"image": List(List(List(Value("uint8")))), "caption": Value("string")}),
    )
    assert colors(load_pairs(pairs)) == [RED]


# Words that other readers take for nothing


WORDS = ["None", "null", "NA", "nan", "7", "true", "a, b"]


def test_every_cell_of_a_csv_is_text(tmp_path, streaming):
    lines = ["file_name,caption,unused"]
    for index, word in enumerate(WORDS):
        (tmp_path / f"{index}.png").write_bytes(png("red"))
        lines.append(f'{index}.png,"{word}",')
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    pairs = load_pairs(str(tmp_path), streaming=streaming)
    assert [row["caption"] for row in pairs] == WORDS


def test_an_empty_cell_of_a_csv_is_no_caption(tmp_path, tiny_processor):
    (tmp_path / "0.png").write_bytes(png("red"))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,\n")
    collate = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor)
    assert collate(list(load_pairs(str(tmp_path)))) == {"bad_rows": {"no caption": 1}}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_images_that_metadata_do_not_name_are_counted(tmp_path, name, streaming, caplog):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(png("red"))
    named = (
        '{"file_name": "1.png", "caption": "a"}\n' * 2 if name.endswith("jsonl") else "file_name,caption\n1.png,a\n"
    )
    (tmp_path / name).write_text(named)
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(str(tmp_path), streaming=streaming)
    assert f"2 of the 3 images in {tmp_path} are not named in its metadata, and left out" in caplog.text
    assert {row["caption"] for row in pairs} == {"a"}


# Data sets on the Hub


@pytest.fixture
def hub(monkeypatch, clone):
    """`owner/pairs` on a Hub, for which the clone of it stands; the calls of `load_dataset`."""
    calls = []

    def load(name, config, **kwargs):
        calls.append((name, config, kwargs))
        return load_dataset(str(clone), config, **kwargs)

    builder = clipmap_hf.data.folders.load_dataset_builder
    monkeypatch.setattr(clipmap_hf.data.folders, "load_dataset", load)
    monkeypatch.setattr(
        clipmap_hf.data.folders, "load_dataset_builder", lambda name, config: builder(str(clone), config)
    )
    return calls


def test_of_a_data_set_on_the_hub_the_needed_columns_are_read(hub, streaming):
    pairs = load_pairs("owner/pairs", streaming=streaming)
    assert [row["caption"] for row in pairs] == ["r", "b"]
    assert hub == [("owner/pairs", None, {"split": "train", "streaming": streaming, "columns": ["image", "caption"]})]


def test_types_that_datasets_does_not_know_are_not_looked_at_on_the_hub(hub, clone):
    odd = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    for path in (clone / "data").glob("*.parquet"):
        pq.write_table(pa.table({"image": IMAGE, "caption": ["a"], "odd": odd}), path)
    builder = clipmap_hf.data.folders.load_dataset_builder("owner/pairs", None)
    files = builder.config.data_files["train"]
    assert clipmap_hf.data.folders._needed(builder, files, "image", ["caption"]) == ["image", "caption"]


def test_a_column_that_a_data_set_on_the_hub_lacks_is_named(hub):
    with pytest.raises(ValueError, match=r"no column \['text'\]; it has \['image', 'caption'\]"):
        load_pairs("owner/pairs", caption_columns=["text"])


def test_a_stream_whose_columns_are_unknown_is_an_error(hub, monkeypatch):
    unknown = IterableDataset.from_generator(lambda: iter([{"image": None, "caption": "a"}]))
    monkeypatch.setattr(clipmap_hf.data.folders, "load_dataset", lambda *_, **__: unknown)
    with pytest.raises(ValueError, match="columns of 'some/pairs' are unknown .* streaming=False"):
        load_pairs("some/pairs", streaming=True)


def test_a_data_set_that_cannot_be_read_says_why(hub, clone):
    rows = Dataset.from_dict({"image": IMAGE, "caption": [["a", "b"]]})
    rows.to_parquet(clone / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"'owner/pairs' cannot be read: .*(cast|caption)"):
        load_pairs("owner/pairs")


# Misspelt paths


@pytest.mark.parametrize("source", ["./pairs", "a/b/c", "/no/such/folder", "pairs/..", "C:\\pairs"])
def test_a_path_that_can_be_no_id_is_refused_at_once(source):
    with pytest.raises(FileNotFoundError, match="There is no file or folder .* 'owner/name'"):
        load_pairs(source)


class Asked:
    """Stands for `HfApi`; notes what it is asked."""

    answers = None
    asked: list[tuple[str, str]] = []

    def __init__(self, token=None):
        pass

    def repo_info(self, source, repo_type, timeout):
        self.asked.append((source, repo_type))
        if self.answers is not None:
            raise self.answers


@pytest.fixture
def asked(monkeypatch, tmp_path):
    (tmp_path / "pairs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipmap_hf.files.hub_ids.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("clipmap_hf.files.hub_ids.HfApi", Asked)
    monkeypatch.setattr(Asked, "asked", [])
    return Asked


@pytest.mark.parametrize("error", [ConnectionError("no network"), TimeoutError("too slow")], ids=repr)
def test_a_misspelt_path_beside_existing_folders_is_asked_for_once(asked, monkeypatch, error):
    monkeypatch.setattr(asked, "answers", error)
    for source in ("pairs/trian", "piars"):
        with pytest.raises(
            FileNotFoundError, match=f"no file or folder '{source}', and the Hub did not say .*{error}"
        ):
            check_hub_id(source, "dataset")
    assert asked.asked == [("pairs/trian", "dataset"), ("piars", "dataset")]


def test_what_the_hub_has_passes_and_an_id_of_another_owner_is_not_asked_for(asked):
    check_hub_id("pairs/train", "model")
    check_hub_id("owner/train", "model")
    assert asked.asked == [("pairs/train", "model")]


@pytest.mark.parametrize("load", [load_model, ClipMapCompressor.from_pretrained])
def test_a_misspelt_folder_of_a_model_is_refused_at_once(load):
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder '\./no/such/model'"):
        load("./no/such/model")


def test_an_answer_of_not_found_is_an_error(asked, monkeypatch):
    import httpx2

    request = httpx2.Request("GET", "https://hub")
    answer = HfHubHTTPError("404: no such repository", response=httpx2.Response(404, request=request))
    monkeypatch.setattr(asked, "answers", answer)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        check_hub_id("pairs/trian", "dataset")
