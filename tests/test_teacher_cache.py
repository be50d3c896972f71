import io
import json
import logging
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, CLIPModel

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator, normalized_pixels
from clipmap_hf.data.columns import ERROR_COLUMN
from clipmap_hf.data.keys import content_key
from clipmap_hf.data.tokenizer import train_clip_tokenizer
from clipmap_hf.models.features import encode_images, encode_texts
from clipmap_hf.models.fingerprints import model_fingerprint
from clipmap_hf.teacher_cache import build as build_cache
from clipmap_hf.teacher_cache import files as cache_files
from clipmap_hf.teacher_cache.build import build_teacher_cache, finish_teacher_cache
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.manifest import cache_manifest
from clipmap_hf.teacher_cache.view_batches import ViewCollator


VIEWS, BLOCK_SIZE, BATCH_SIZE = 3, 5, 6  # two rows per batch; a block is two batches and a half
EXACT = {"atol": 1e-3, "rtol": 0}  # fp16 of values below 1


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def plain_rows(pairs: list[dict]) -> list[dict]:
    return [row | {"image": {"bytes": png(row["image"]), "path": None}} for row in pairs]


@pytest.fixture(scope="module")
def rows(tiny_pairs) -> datasets.Dataset:
    """12 undecoded pairs."""
    return datasets.Dataset.from_list(plain_rows(tiny_pairs[::2]))


@pytest.fixture(scope="module")
def collator(tiny_processor) -> PairCollator:
    """Draws captions and keywords at random, and makes three views."""
    return PairCollator(
        tiny_processor.tokenizer,
        tiny_processor.image_processor,
        ("caption",),
        ("keywords",),
        "random",
        Augmentation(scale=(0.4, 1.0), flip=0.5),
        views=VIEWS,
    )


@pytest.fixture(scope="module")
def teachers(shared_teacher, tiny_config) -> list[CLIPModel]:
    """Two, of different projection dimensions."""
    return [shared_teacher, randomize(CLIPModel(tiny_config(projection_dim=16)), seed=1).eval()]


def manifest_of(collator: PairCollator, teachers: list) -> dict:
    return cache_manifest([{"weights": model_fingerprint(one)} for one in teachers], collator, VIEWS, {"rows": "tiny"})


def build(folder: Path, teachers: list, rows, collator: PairCollator, **options) -> None:
    options = {"batch_size": BATCH_SIZE, "block_size": BLOCK_SIZE} | options
    build_teacher_cache(folder, teachers, rows, collator, manifest_of(collator, teachers), **options)


@pytest.fixture(scope="module")
def built(teachers, rows, collator, tmp_path_factory) -> Path:
    """A complete cache of `rows`; copy it before changing it."""
    folder = tmp_path_factory.mktemp("cache")
    build(folder, teachers, rows, collator)
    finish_teacher_cache(folder)
    return folder


@pytest.fixture
def own_copy(built, tmp_path) -> Path:
    for path in built.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(folder: Path, rows: list[dict], collator: PairCollator) -> list[torch.Tensor]:
    """The embeddings of all views and captions."""
    examples = ViewCollator(collator, VIEWS)(list(rows))
    views = [view for _ in examples["image_keys"] for view in range(VIEWS)]
    keys = [key for key in examples["image_keys"] for _ in range(VIEWS)]
    embeds = TeacherCache.open(folder).lookup(keys, views, examples["text_keys"])
    return [one for pair in embeds for one in pair]


@torch.no_grad()
def assert_as_live(batch: dict, teachers: list) -> None:
    """That `teacher_embeds` are what the teachers make of the batch itself."""
    assert len(batch["teacher_embeds"]) == len(teachers)
    for teacher, (images, texts) in zip(teachers, batch["teacher_embeds"], strict=True):
        assert images.dtype == texts.dtype == torch.float16
        torch.testing.assert_close(images.float(), encode_images(teacher, normalized_pixels(batch)), **EXACT)
        live = encode_texts(teacher, batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(texts.float(), live, **EXACT)


# Reading


@pytest.mark.parametrize("epoch", range(2 * VIEWS))
def test_the_cache_gives_what_the_teachers_make_of_the_same_views_and_captions(built, teachers, rows, collator, epoch):
    collator = replace(collator, teacher_cache=TeacherCache.open(built))
    order = random.Random(epoch).sample(range(len(rows)), k=len(rows))
    assert_as_live(collator([{**rows[index], "epoch": epoch} for index in order]), teachers)


def test_views_of_an_image_differ(built, rows, collator):
    images = everything(built, rows, collator)[0].unflatten(0, (-1, VIEWS))
    assert (images[:, 0] - images[:, 1]).abs().amax(-1).min() > 1e-3


def test_embeddings_are_normalized(built, rows, collator):
    for embeds in everything(built, rows, collator):
        torch.testing.assert_close(embeds.float().norm(dim=-1), torch.ones(len(embeds)), atol=2e-3, rtol=0)


def test_an_image_with_several_captions_has_one_crop_per_view(teachers, rows, collator, tmp_path):
    """However much chance is spent on the captions of a row, the image's crop is the same."""
    others = [{**row, "keywords": ["drawing"] * (index % 4), "caption": "a"} for index, row in enumerate(rows)]
    double = datasets.Dataset.from_list([row for pair in zip(rows, others, strict=True) for row in pair])
    build(tmp_path, teachers, double, collator, batch_size=3 * VIEWS, block_size=7)
    finish_teacher_cache(tmp_path)
    cache = TeacherCache.open(tmp_path)
    assert (cache.summary["rows"], cache.summary["images"]) == (2 * len(rows), len(rows))
    for epoch in range(VIEWS):
        batch = replace(collator, teacher_cache=cache)([{**row, "epoch": epoch} for row in double])
        assert_as_live(batch, teachers)


def test_workers_read_the_cache(built, teachers, rows, collator):
    cache = TeacherCache.open(built)
    everything(built, rows, collator)
    loader = DataLoader(
        [{**row, "epoch": 1} for row in rows], 4, collate_fn=replace(collator, teacher_cache=cache), num_workers=2
    )
    batches = list(loader)
    assert len(batches) == 3
    for batch in batches:
        assert_as_live(batch, teachers)


def test_a_cache_in_use_can_be_sent_to_another_process(built, rows, collator):
    cache = TeacherCache.open(built)
    keys = [content_key(rows[0]["image"]["bytes"])]
    before = cache.lookup(keys, [1], [])
    sent = pickle.dumps(cache)
    assert len(sent) < 5000  # what it mapped stays here
    for (images, texts), (same, _) in zip(before, pickle.loads(sent).lookup(keys, [1], []), strict=True):
        assert torch.equal(images, same) and texts.shape == (0, images.shape[1])


def test_what_is_not_in_the_cache_is_counted(built, rows):
    cache = TeacherCache.open(built)
    image, text = content_key(rows[0]["image"]["bytes"]), content_key(rows[0]["caption"])
    with pytest.raises(ValueError, match="2 of 3 images are not in the teacher cache.*other images"):
        cache.lookup([image, 1, 2**64 - 1], [0, 0, 0], [])
    with pytest.raises(ValueError, match="1 of 2 texts are not in the teacher cache.*other captions"):
        cache.lookup([image], [0], [text, 0])
    with pytest.raises(ValueError, match=r"3 views per image, so none numbered \[-1, 3\]; give the collator views=3"):
        cache.lookup([image, image], [3, -1], [])


def test_it_takes_two_bytes_per_number(rows, collator, tiny_config, tmp_path):
    dim = 512
    build(tmp_path, [randomize(CLIPModel(tiny_config(projection_dim=dim)))], rows, collator, block_size=100)
    finish_teacher_cache(tmp_path)
    summary = TeacherCache.open(tmp_path).summary
    embeddings = summary["images"] * VIEWS + summary["texts"]
    size = sum(len(content) for content in contents(tmp_path).values())
    assert 2 * dim * embeddings < size < 1.1 * 2 * dim * embeddings
    assert summary["texts"] < len(rows) * VIEWS  # captions drawn twice are there once


# The manifest


def test_a_fingerprint_names_weights_and_nothing_else(tiny_teacher, tmp_path):
    fingerprint = model_fingerprint(tiny_teacher)
    tiny_teacher.save_pretrained(tmp_path, max_shard_size="200KB")
    assert model_fingerprint(CLIPModel.from_pretrained(tmp_path)) == fingerprint
    assert model_fingerprint(tiny_teacher.bfloat16()) != fingerprint
    tiny_teacher.float()
    assert model_fingerprint(tiny_teacher) != fingerprint  # rounded


def test_a_manifest_survives_json_and_tokenizing(collator, teachers):
    manifest = manifest_of(collator, teachers)
    assert json.loads(json.dumps(manifest)) == manifest
    collator.tokenizer(["a", "longer text"], padding=True, truncation=True)
    assert manifest_of(collator, teachers) == manifest
    collator.tokenizer(["a", "longer text"], padding="max_length", max_length=7, truncation=True)
    assert manifest_of(collator, teachers) == manifest
    with pytest.raises(ValueError, match="give the collator an augmentation"):
        manifest_of(replace(collator, augmentation=None), teachers)


def test_a_manifest_names_only_what_is_unusual_of_an_image_processor(collator, teachers):
    """So a cache that was built before there were these names is still good."""
    usual = collator.image_processor
    expected = {"size": 32, "mean": list(usual.image_mean), "std": list(usual.image_std)}
    assert manifest_of(collator, teachers)["image_processor"] == expected


def changed_images(**changes) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(**{"size": {"height": 32, "width": 32}, "do_center_crop": False} | changes)


def smaller_images() -> CLIPImageProcessorPil:
    size = {"height": 16, "width": 16}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.0] * 3, image_std=[1.0] * 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, ["seed is 0 in the cache, 7 is asked"]),
        (
            {"augmentation": Augmentation(scale=(0.7, 1.0), flip=0.5, rotation=3.0)},
            [
                "augmentation.scale is [0.4, 1.0] in the cache, [0.7, 1.0] is asked",
                "augmentation.rotation is 0.0 in the cache, 3.0 is asked",
            ],
        ),
        ({"caption_sampling": "first"}, ['captions.caption_sampling is "random" in the cache, "first" is asked']),
        ({"caption_columns": ["other"]}, ['captions.caption_columns is ["caption"] in the cache, ["other"] is asked']),
        ({"keyword_columns": ()}, ['captions.keyword_columns is ["keywords"] in the cache, [] is asked']),
        (
            {"image_processor": smaller_images()},
            [
                "image_processor.size is 32 in the cache, 16 is asked",
                "[0.0, 0.0, 0.0] is asked",
                "image_processor.std is [",
            ],
        ),
        (
            {"image_processor": changed_images(do_normalize=False)},
            ["[0.0, 0.0, 0.0] is asked", "[1.0, 1.0, 1.0] is asked"],
        ),
        ({"image_processor": changed_images(do_rescale=False)}, ["divisor is nothing in the cache, 1.0 is asked"]),
        ({"image_processor": changed_images(rescale_factor=1 / 128)}, ["divisor is nothing in the cache, 128.0 is"]),
        ({"image_processor": changed_images(resample=2)}, ['resample is nothing in the cache, "BILINEAR" is asked']),
        (
            {"image_processor": changed_images(size={"height": 64, "width": 32})},
            ["image_processor.size is 32 in the cache, [64, 32] is asked"],
        ),
        (
            {"tokenizer": train_clip_tokenizer(["red circle"], vocab_size=520)},
            ["tokenizer.hash is", "tokenizer.model_max_length is 16 in the cache, 32 is asked"],
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_the_collator_does_otherwise_is_named(built, teachers, collator, change, words):
    with pytest.raises(ValueError, match="was built for something else: .*in another folder") as error:
        TeacherCache.open(built).check(manifest_of(replace(collator, **change), teachers))
    for word in words:
        assert word in str(error.value)
    assert str(error.value).count("is asked") == len(words)


def test_other_teachers_views_and_data_are_named(built, teachers, collator):
    cache = TeacherCache.open(built)
    asked = manifest_of(collator, teachers)
    cache.check(asked)
    other = asked | {"views": 4, "teachers": [{"weights": "abc"}], "data": {"files": {"a.parquet": 3}}, "format": 2}
    with pytest.raises(ValueError) as error:
        cache.check(other)
    for word in (
        'teachers.0.weights is "',
        '"abc" is asked',
        "teachers.1.weights is",
        "nothing is asked",
        "views is 3 in the cache, 4 is asked",
        'data.rows is "tiny" in the cache, nothing is asked',
        "data.files.a.parquet is nothing in the cache, 3 is asked",
        "format is 1 in the cache, 2 is asked",
    ):
        assert word in str(error.value)


# Building


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_ranks_and_workers_give_the_same_cache(
    built, teachers, rows, collator, tmp_path, stream, world_size, num_workers
):
    given = rows.to_iterable_dataset(num_shards=4) if stream else rows
    for rank in range(world_size):
        build(tmp_path, teachers, given, collator, rank=rank, world_size=world_size, num_workers=num_workers)
    finish_teacher_cache(tmp_path)
    if world_size == 1:
        assert contents(tmp_path) == contents(built)
    for found, expected in zip(everything(tmp_path, rows, collator), everything(built, rows, collator), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


class Killed(BaseException):
    """What no handler expects."""


def failing_call(monkeypatch, owner, name: str, error: BaseException, call: int) -> None:
    """Lets a function raise at its `call`-th call."""
    function, calls = getattr(owner, name), iter(range(1000))

    def fail(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


def interrupted_build(folder: Path, *args, **options) -> bool:
    try:
        build(folder, *args, **options)
    except Killed:
        return True
    return False


@pytest.mark.parametrize(
    ("where", "step", "stream"), [("encode_images", 3, False), ("replace", 1, False), ("replace", 1, True)]
)
def test_a_build_goes_on_after_any_interruption(
    built, teachers, rows, collator, tmp_path, monkeypatch, where, step, stream
):
    owner = os if where == "replace" else build_cache
    given = rows.to_iterable_dataset(num_shards=4) if stream else rows
    for call in range(0, 100, step):  # of two teachers and two or three batches per block
        folder = tmp_path / str(call)
        with monkeypatch.context() as patch:
            failing_call(patch, owner, where, Killed(), call)
            interrupted = interrupted_build(folder, teachers, given, collator)
        if not interrupted:
            break
        assert not list(folder.glob("rank-0.json"))
        build(folder, teachers, given, collator)
        finish_teacher_cache(folder)
        assert contents(folder) == contents(built)
    assert call > 4  # the manifest, three blocks and the marker


def test_a_build_that_is_killed_again_and_again_loses_a_block_each_time_at_most(
    built, teachers, rows, collator, tmp_path, monkeypatch
):
    calls = -(-BLOCK_SIZE // (BATCH_SIZE // VIEWS)) * len(teachers) + 1  # a block and a batch
    for attempts in range(1, 10):  # noqa: B007 - counts
        with monkeypatch.context() as patch:
            failing_call(patch, build_cache, "encode_images", Killed(), calls)
            if not interrupted_build(tmp_path, teachers, rows, collator):
                break
    assert attempts == 3
    finish_teacher_cache(tmp_path)
    assert contents(tmp_path) == contents(built)


def test_data_that_ends_with_a_block_needs_no_last_one(teachers, rows, collator, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build_cache, "write_json", lambda *_: (_ for _ in ()).throw(Killed()))  # before the marker
        assert interrupted_build(tmp_path, teachers, rows, collator, block_size=6)
    build(tmp_path, teachers, rows, collator, block_size=6)
    finish_teacher_cache(tmp_path)
    assert len(TeacherCache.open(tmp_path).summary["blocks"]) == 2


def test_a_finished_build_computes_nothing_again(own_copy, built, teachers, rows, collator, monkeypatch):
    failing_call(monkeypatch, build_cache, "encode_images", Killed(), 0)
    build(own_copy, teachers, rows, collator)
    finish_teacher_cache(own_copy)
    assert contents(own_copy) == contents(built)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 4}, "block_size is 5 in the cache, 4 is asked"),
        ({"world_size": 2}, "world_size is 1 in the cache, 2 is asked"),
    ],
)
def test_a_folder_is_built_for_one_thing_only(own_copy, built, teachers, rows, collator, options, words):
    with pytest.raises(ValueError, match=words):
        build(own_copy, teachers, rows, collator, **options)
    with pytest.raises(ValueError, match="; seed is 0 in the cache, 1 is asked|: seed is 0 in the cache, 1 is asked"):
        build(own_copy, teachers, rows, replace(collator, seed=1))
    assert contents(own_copy) == contents(built)


def test_teachers_are_frozen_while_they_run_and_then_as_before(model_with_dropout, rows, collator, tmp_path):
    for folder in ("once", "again"):
        build(tmp_path / folder, [model_with_dropout], rows, collator)
    assert model_with_dropout.training
    assert contents(tmp_path / "once") == contents(tmp_path / "again")


def test_half_written_files_of_the_same_process_are_removed(own_copy, built, teachers, rows, collator):
    for rank in (0, 1):
        (own_copy / f".rank-{rank}-block-00007.safetensors.123.tmp").write_text("{")
    build(own_copy, teachers, rows, collator)
    assert set(contents(own_copy)) - set(contents(built)) == {".rank-1-block-00007.safetensors.123.tmp"}


def test_a_collator_that_reads_a_cache_can_build_another(built, teachers, rows, collator, tmp_path):
    reader = replace(collator, seed=1, teacher_cache=TeacherCache.open(built))
    build(tmp_path, teachers, rows, reader)
    finish_teacher_cache(tmp_path)
    reader.teacher_cache = TeacherCache.open(tmp_path)
    assert_as_live(reader([{**row, "epoch": 2} for row in rows]), teachers)


def test_building_leaves_the_global_random_state_alone(teachers, rows, collator, tmp_path):
    states = random.getstate(), torch.get_rng_state()
    build(tmp_path, teachers, rows, collator)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_more_processes_than_shards_or_rows_is_an_error(teachers, rows, collator, tmp_path):
    with pytest.raises(ValueError, match="2 shards, fewer than the 3 processes.*split the data"):
        build(tmp_path, teachers, rows.to_iterable_dataset(num_shards=2), collator, world_size=3)
    with pytest.raises(ValueError, match="2 rows, fewer than the 3 processes"):
        build(tmp_path, teachers, rows.select(range(2)), collator, world_size=3)


# What goes wrong


@pytest.fixture(scope="module")
def spoiled(rows) -> datasets.Dataset:
    """`rows` and four that cannot be used, one of them named so by the reader."""
    good = [{**row, ERROR_COLUMN: None} for row in rows]
    broken = {"bytes": good[0]["image"]["bytes"][:60], "path": None}
    bad = [
        good[0] | {"image": broken},
        good[1] | {"image": broken},
        good[2] | {"caption": " ", "keywords": []},
        good[3] | {ERROR_COLUMN: "unreadable image"},
    ]
    return datasets.Dataset.from_list([row for pair in zip(good, bad, strict=False) for row in pair] + good[4:])


def test_bad_rows_are_counted_and_left_out(built, teachers, rows, spoiled, collator, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(tmp_path, teachers, spoiled, collator)
    finish_teacher_cache(tmp_path)
    summary = TeacherCache.open(tmp_path).summary
    assert summary["bad_rows"] == {"undecodable image": 2, "no caption": 1, "unreadable image": 1}
    assert (summary["rows"], summary["images"]) == (len(spoiled), len(rows))
    assert "of 16 rows, 4 (1 no caption, 2 undecodable image, 1 unreadable image) were left out" in caplog.text
    for found, expected in zip(everything(tmp_path, rows, collator), everything(built, rows, collator), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_too_many_bad_rows_stop_the_build_and_those_before_an_interruption_count(
    teachers, spoiled, collator, tmp_path
):
    words = r"Of the first 9 rows, 4 \(1 no caption, .*\) cannot be used, more than max_bad_fraction=0.003 allows"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            build(tmp_path, teachers, spoiled, collator, max_bad_fraction=0.003)  # of 1000 rows, that is, three
    assert (tmp_path / "rank-0-block-00000.safetensors").exists()
    build(tmp_path, teachers, spoiled, collator, max_bad_fraction=0.004)
    finish_teacher_cache(tmp_path)
    assert sum(TeacherCache.open(tmp_path).summary["bad_rows"].values()) == 4


def test_blocks_of_bad_rows_are_empty(teachers, rows, collator, tmp_path):
    blank = [{**row, "caption": "", "keywords": []} for row in rows]
    build(
        tmp_path / "some",
        teachers,
        datasets.Dataset.from_list([*blank[:10], *rows, *blank]),
        collator,
        max_bad_fraction=1,
    )
    finish_teacher_cache(tmp_path / "some")
    assert len(everything(tmp_path / "some", rows, collator)[0]) == len(rows) * VIEWS
    build(tmp_path / "all", teachers, datasets.Dataset.from_list(blank), collator, max_bad_fraction=1)
    with pytest.raises(ValueError, match=r"is empty: none of its rows is usable \({'no caption': 12}\)"):
        finish_teacher_cache(tmp_path / "all")


def test_an_incomplete_cache_says_how_far_it_is(teachers, rows, collator, tmp_path):
    with pytest.raises(ValueError, match="There is no teacher cache in .*build it first"):
        TeacherCache.open(tmp_path)
    build(tmp_path, teachers, rows, collator, rank=1, world_size=2)
    progress = "2 blocks of at most 5 rows are written, and 1 of 2 processes are done"
    with pytest.raises(ValueError, match=f"is not complete: {progress}.*goes on where it stopped"):
        TeacherCache.open(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be finished: {progress}"):
        finish_teacher_cache(tmp_path)
    build(tmp_path, teachers, rows, collator, rank=0, world_size=2)
    with pytest.raises(ValueError, match="is not complete: 4 blocks of at most 5 rows are written, and 2 of 2"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize("name", ["rank-0-block-00001.safetensors", "index.safetensors"])
def test_a_truncated_file_is_refused_and_written_anew(own_copy, built, teachers, rows, collator, name):
    cache, path = TeacherCache.open(own_copy), own_copy / name
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(
        ValueError, match=f"{name}', has {path.stat().st_size} bytes, .* were written.*delete this file"
    ):
        TeacherCache.open(own_copy)
    with pytest.raises(ValueError, match=f"{name}', cannot be read.*delete this file"):
        cache.lookup([content_key(row["image"]["bytes"]) for row in rows], [0] * len(rows), [])
    path.unlink()
    with pytest.raises(ValueError, match="has 0 bytes"):
        TeacherCache.open(own_copy)
    build(own_copy, teachers, rows, collator)
    finish_teacher_cache(own_copy)
    assert contents(own_copy) == contents(built)


def test_a_truncated_block_stops_a_build_that_would_go_on(own_copy, teachers, rows, collator):
    path = own_copy / "rank-0-block-00000.safetensors"
    os.truncate(path, 200)
    (own_copy / "rank-0.json").unlink()
    with pytest.raises(ValueError, match="rank-0-block-00000.safetensors', cannot be read.*delete this file"):
        build(own_copy, teachers, rows, collator)


@pytest.mark.parametrize("call", range(5))
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    built, teachers, rows, collator, tmp_path, monkeypatch, call
):
    with monkeypatch.context() as patch:
        failing_call(patch, os, "fsync", OSError(28, "No space left on device"), call)
        with pytest.raises(OSError, match="could not be written .*No space left on device.*make room") as error:
            build(tmp_path, teachers, rows, collator)
    assert error.value.errno == 28
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(list(tmp_path.iterdir())) == call
    build(tmp_path, teachers, rows, collator)
    finish_teacher_cache(tmp_path)
    assert contents(tmp_path) == contents(built)


def test_a_folder_that_cannot_be_made_is_said(teachers, rows, collator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="manifest.json could not be written"):
        build(tmp_path / "file" / "cache", teachers, rows, collator)


def test_of_equal_keys_the_first_is_indexed(built):
    index = cache_files.load_arrays(built / "index.safetensors")
    blocks = [cache_files.load_arrays(path) for path in sorted(built.glob("rank-0-block-*"))]
    found = [key for block in blocks for key in block["text_keys"].tolist()]
    assert len(found) > len(set(found))  # a caption that two blocks have
    assert np.array_equal(index["text_keys"].numpy(), np.array(sorted(set(found)), dtype=np.uint64))
    for key, block, row in zip(*(index[f"text_{name}"].tolist() for name in ("keys", "blocks", "rows")), strict=True):
        assert blocks[block]["text_keys"][row] == key
        assert all(key not in earlier["text_keys"].tolist() for earlier in blocks[:block])
