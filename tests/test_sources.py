"""From a recipe's arguments to the pairs that they name."""

import dataclasses
import multiprocessing
import os
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value, concatenate_datasets, load_dataset

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.loader import BatchPlan, PairDataset, PairStream
from clipmap_hf.data.sources import evaluation_batches, source_files, training_collator, training_pairs
from clipmap_hf.data.validation import validation_part


@pytest.fixture
def data(pairs_parquet) -> DataArguments:
    path = str(pairs_parquet)
    return DataArguments(train_data=path, eval_data=path, keyword_column=["keywords"], caption_sampling="random")


def test_training_reads_captions_and_keywords_and_evaluation_the_first_caption(data, tiny_processor):
    pairs = training_pairs(data)
    assert set(pairs[0, 0]) == {"image", "caption", "keywords", "epoch"}
    batch = training_collator(data, tiny_processor, seed=0)([pairs[0, i] for i in range(4)])
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 4
    batches = list(evaluation_batches(data, tiny_processor, batch_size=10))
    assert [len(one["pixel_values"]) for one in batches] == [10, 10, 4]


def test_without_evaluation_data_there_is_no_evaluation(data, tiny_processor):
    data.eval_data = None
    assert evaluation_batches(data, tiny_processor) is None


def test_fewer_evaluation_pairs_than_processes_is_an_error(data, tiny_processor, as_process):
    as_process(0, 25)
    with pytest.raises(ValueError, match=r"has 24 pairs, fewer than the 25 processes"):
        evaluation_batches(data, tiny_processor)


def test_processes_share_the_evaluation_pairs(data, tiny_processor, as_process, monkeypatch):
    shares = []
    for index in range(5):
        as_process(index, 5)
        (batch,) = evaluation_batches(data, tiny_processor)
        shares.append(batch["input_ids"][:, 1].tolist())
    monkeypatch.undo()
    (whole,) = evaluation_batches(data, tiny_processor)
    assert sum(shares, []) == whole["input_ids"][:, 1].tolist() and [len(one) for one in shares] == [5, 5, 5, 5, 4]


def test_workers_that_evaluate_outlive_the_signal_that_asks_a_run_to_stop(data, tiny_processor):
    others = multiprocessing.active_children()
    batches = iter(evaluation_batches(data, tiny_processor, num_workers=1))
    next(batches)
    (worker,) = [one for one in multiprocessing.active_children() if one not in others]
    assert os.getpgid(worker.pid) != os.getpgid(0)  # so a signal for the group of the run does not reach it


def test_a_collator_has_the_augmentation_and_captions_that_were_given(data, tiny_processor):
    given = dataclasses.replace(data, crop_scale=[0.3, 0.7], flip=0.1, rotation=2.0, color_jitter=0.3, grayscale=0.4)
    collator = training_collator(given, tiny_processor, seed=7)
    expected = {"scale": (0.3, 0.7), "flip": 0.1, "rotation": 2.0, "color_jitter": 0.3, "grayscale": 0.4}
    assert collator.augmentation == Augmentation(**expected)
    assert (collator.caption_columns, collator.keyword_columns) == (["caption"], ["keywords"])
    assert (collator.caption_sampling, collator.seed, collator.views) == ("random", 7, None)


def test_streaming_reads_shard_by_shard(pairs_tars, tiny_processor):
    data = DataArguments(
        pairs_tars, streaming=True, shuffle_buffer=3, image_column="png", caption_column=["txt"], max_bad_fraction=0.0
    )
    pairs = training_pairs(data)
    assert isinstance(pairs, PairStream) and pairs.shuffle_buffer == 3 and pairs.pairs.num_shards == 4
    batches = list(islice(pairs.steps(BatchPlan(6, 3), training_collator(data, tiny_processor, seed=0)), 4))
    assert [[len(chunk["input_ids"]) for chunk in step] for step in batches] == [[3, 3]] * 4
    assert isinstance(training_pairs(dataclasses.replace(data, streaming=False)), PairDataset)


# Pairs held out for validation


def test_each_image_is_held_out_or_trained_on(data, tiny_processor):
    split = dataclasses.replace(data, eval_data=None, validation_fraction=0.3)
    whole, training = ({bytes(row["image"]["bytes"]) for row in training_pairs(each).pairs} for each in (data, split))
    held_out = sum(len(batch["pixel_values"]) for batch in evaluation_batches(split, tiny_processor))
    assert 0 < len(training) < len(whole) == 24
    assert len(training) + held_out == 24


def test_equal_images_are_on_the_same_side(pairs_parquet, tmp_path):
    once = load_dataset("parquet", data_files=str(pairs_parquet), split="train")
    concatenate_datasets([once, once]).to_parquet(tmp_path / "twice.parquet")
    data = DataArguments(str(tmp_path / "twice.parquet"), validation_fraction=0.3)
    contents = [bytes(row["image"]["bytes"]) for row in training_pairs(data).pairs]
    assert 0 < len(contents) == 2 * len(set(contents)) < 48


def test_an_unusable_image_is_left_to_training_which_counts_it():
    features = Features({"image": Image(decode=False), "caption": Value("string")})
    pairs = Dataset.from_dict({"image": [{"bytes": b"", "path": None}], "caption": ["a"]}, features=features)
    assert [len(validation_part(pairs, 0.9, held_out=side)) for side in (True, False)] == [0, 1]


def test_a_held_out_share_is_part_of_the_name_of_the_pairs():
    assert source_files(DataArguments("me/pairs", validation_fraction=0.1))["validation_fraction"] == 0.1


# Names of the pairs


def test_source_files_are_names_and_sizes(pairs_tars, pairs_tar):
    folder = Path(pairs_tars).parent
    sizes = {f"pairs-{i}.tar": (folder / f"pairs-{i}.tar").stat().st_size for i in range(4)}
    rest = {"split": "train", "image_column": "png"}
    for name in (pairs_tars, str(folder)):
        assert source_files(DataArguments(name, image_column="png")) == {"files": sizes, **rest}
    one = source_files(DataArguments(str(pairs_tar), image_column="png"))
    assert one == {"files": {"pairs.tar": pairs_tar.stat().st_size}, **rest}


def test_source_files_do_not_depend_on_where_the_files_lie(pairs_tars, tmp_path):
    for path in Path(pairs_tars).parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert source_files(DataArguments(str(tmp_path / "*.tar"))) == source_files(DataArguments(pairs_tars))
    (tmp_path / "pairs-0.tar").write_bytes(b"shorter")
    assert source_files(DataArguments(str(tmp_path / "*.tar"))) != source_files(DataArguments(pairs_tars))


def test_the_source_of_a_hub_data_set_is_its_id():
    source = source_files(DataArguments("me/pairs", train_split="validation", image_column="jpg"))
    assert source == {"files": "me/pairs", "split": "validation", "image_column": "jpg"}


def test_files_of_equal_names_in_different_folders_are_told_apart(tmp_path):
    for folder, size in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "000.tar").write_bytes(b"x" * size)
    before = source_files(DataArguments(str(tmp_path / "*" / "*.tar")))
    assert before["files"] == {"a/000.tar": 1, "b/000.tar": 2}
    (tmp_path / "a" / "000.tar").write_bytes(b"xxx")
    assert source_files(DataArguments(str(tmp_path / "*" / "*.tar"))) != before


def test_the_files_of_a_configuration_are_those_of_its_folder(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    source = source_files(DataArguments(f"{tmp_path}:small"))
    assert source["files"] == {"a.parquet": 1} and source["config"] == "small"


def test_hidden_files_are_no_data_and_changed_metadata_are_noticed(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("x")
    (tmp_path / "0.png").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text("cat")
    before = source_files(DataArguments(str(tmp_path)))["files"]
    (tmp_path / "metadata.jsonl").write_text("dog")
    assert (
        before.keys() == {"0.png", "metadata.jsonl"} and source_files(DataArguments(str(tmp_path)))["files"] != before
    )


def test_sampling_follows_the_columns_when_they_change():
    data = DataArguments("pairs")
    assert data.caption_sampling is None
    assert dataclasses.replace(data, caption_column=["caption", "alt"]).sampling == "random"


def test_a_file_whose_name_looks_like_a_glob_has_its_size(tmp_path):
    (tmp_path / "pairs[1].tar").write_bytes(b"xx")
    assert source_files(DataArguments(str(tmp_path / "pairs[1].tar")))["files"] == {"pairs[1].tar": 2}


@pytest.mark.parametrize(
    ("columns", "sampling"),
    [
        ({}, "first"),
        ({"caption_column": ["caption", "alt"]}, "random"),
        ({"keyword_column": ["keywords"]}, "random"),
        ({"keyword_column": ["keywords"], "caption_sampling": "first"}, "first"),
    ],
)
def test_columns_that_are_named_are_used(columns, sampling):
    assert DataArguments("pairs", **columns).sampling == sampling
