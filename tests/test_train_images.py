"""Images without captions, beside texts that do not belong to them, or beside pairs."""

import dataclasses
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset, concatenate_datasets
from PIL import Image
from test_recipe_configs import load_recipe

import clipmap_hf.data.text_sources
from clipmap_hf import (
    ClipMapCompressor,
    ClipMapConfig,
    DistillationArguments,
    MappingArguments,
    MappingStageArguments,
    MappingTrainer,
    MaskingStageArguments,
    PretrainingArguments,
    PretrainingTrainer,
    TernaryArguments,
    TernaryTrainer,
    TowerConfig,
    compress,
)
from clipmap_hf.data import texts as texts_module
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.sources import source_files, training_pairs
from clipmap_hf.data.texts import Texts
from clipmap_hf.data.validation import validation_part
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.run_arguments import RunArguments


SMALL = ClipMapConfig(vision=TowerConfig(hidden_size=32), text=TowerConfig(hidden_size=32), initializer="manual")
CALIBRATED = dataclasses.replace(SMALL, initializer=None, refit_steps=0)


@pytest.fixture
def queries(tmp_path) -> str:
    path = tmp_path / "queries.txt"
    path.write_text("red circle\nblue bar\n")
    return str(path)


@pytest.fixture
def no_words(monkeypatch):
    """As if the extra `words` were not installed."""

    def missing(number):
        raise ImportError("wonderwords cannot be imported; install it: pip install 'clipmap_hf[words]'.")

    monkeypatch.setattr(clipmap_hf.data.text_sources, "word_texts", missing)


def arguments(folder, **changes) -> DistillationArguments:
    return DistillationArguments(str(folder), **{"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3} | changes)


# What is read


@pytest.mark.parametrize("layout", ["folder", "parquet", "tar"])
def test_of_images_of_any_layout_no_caption_is_read(layout, images, pairs_parquet, pairs_tar, queries, tiny_pairs):
    source = {"folder": images, "parquet": str(pairs_parquet), "tar": str(pairs_tar)}[layout]
    data = DataArguments(train_images=source, train_texts=[queries])
    rows = training_pairs(data).pairs
    assert len(rows) == len(tiny_pairs) and "caption" not in rows.column_names and not data.paired


def test_a_run_needs_pairs_or_images():
    with pytest.raises(ValueError, match="Name what to train on: pairs in train_data, or images .* in train_images"):
        DataArguments()


def test_images_have_no_captions_to_train_on(queries):
    with pytest.raises(ValueError, match="train_images are read without captions; name others in train_texts"):
        DataArguments(train_images="photos", train_texts=[queries, "captions"])


def test_images_without_texts_that_are_given_as_pairs_say_what_to_do(images):
    with pytest.raises(ValueError, match=r"no column \['caption'\].*give the images as train_images, or name"):
        training_pairs(DataArguments(images))


def test_a_column_that_is_misspelt_is_not_taken_for_images_alone(pairs_parquet):
    with pytest.raises(ValueError, match=r"no column \['title'\]; it has \['image', 'caption', 'keywords'\]\.$"):
        training_pairs(DataArguments(str(pairs_parquet), caption_column=["title"]))


def test_images_of_a_run_and_pairs_of_the_same_files_are_described_alike(images, queries):
    apart = source_files(DataArguments(train_images=images, train_texts=[queries]))
    assert apart == source_files(DataArguments(images, train_texts=[queries]))
    both = source_files(DataArguments(images, train_images=images, train_texts=[queries]))
    assert both == apart | {"images": {"files": apart["files"]}}


# Which texts images without captions get


def test_without_texts_images_are_trained_beside_words(images):
    pytest.importorskip("wonderwords")
    data = DataArguments(train_images=images)
    assert (
        data.shown_texts["train_texts"] == ["words"] and len(data.texts.distinct) == 20_000 and data.read_columns == []
    )


def test_beside_pairs_images_get_words_and_pairs_both(images, pairs_parquet):
    pytest.importorskip("wonderwords")
    data = DataArguments(str(pairs_parquet), train_images=images)
    assert (
        data.shown_texts["train_texts"] == ["captions", "words"]
        and data.read_columns == ["caption"]
        and not data.paired
    )


def test_texts_that_are_named_stay_as_they_are_and_so_do_pairs(images, pairs_parquet, queries):
    assert DataArguments(train_images=images, train_texts=[f"{queries}=2"]).train_texts == [f"{queries}=2"]
    assert DataArguments(str(pairs_parquet)).train_texts == [] and DataArguments(str(pairs_parquet)).paired
    assert DataArguments(str(pairs_parquet), train_texts=["captions"]).paired


def test_words_join_fewer_texts_than_the_constant_says(monkeypatch, images, queries, caplog):
    pytest.importorskip("wonderwords")
    monkeypatch.setattr(texts_module, "FEW_TEXTS", 3)
    with caplog.at_level("INFO"):
        assert DataArguments(train_images=images, train_texts=[queries]).shown_texts == {
            "train_texts": [queries, "words"]
        }
    assert "There are 2 different texts beside captions; 20000 of `words` are added." in caplog.text
    monkeypatch.setattr(texts_module, "FEW_TEXTS", 2)
    assert DataArguments(train_images=images, train_texts=[queries]).shown_texts == {"train_texts": [queries]}


def test_words_that_are_missing_stop_a_run_only_if_there_are_no_others(no_words, monkeypatch, images, queries, caplog):
    with pytest.raises(ImportError, match=r"Name some in train_texts, or: .* pip install 'clipmap_hf\[words\]'"):
        _ = DataArguments(train_images=images).texts
    monkeypatch.setattr(texts_module, "FEW_TEXTS", 3)
    assert DataArguments(train_images=images, train_texts=[queries]).shown_texts == {"train_texts": [queries]}
    assert "only 2 different texts, and `words` cannot be added to them: wonderwords cannot be imp" in caplog.text


# Pairs and images mixed


def test_pairs_and_images_are_mixed(images, pairs_parquet, pairs_tar, queries, tiny_pairs):
    texts = {"train_texts": [queries, "captions"]}
    rows = training_pairs(DataArguments(str(pairs_parquet), train_images=images, **texts)).pairs
    captions = [row["caption"] for row in rows]
    assert captions == [row["caption"] for row in tiny_pairs] + [None] * len(tiny_pairs)
    tars = DataArguments(str(pairs_tar), train_images=images, caption_column=["txt"], **texts)
    assert len(training_pairs(tars).pairs) == 2 * len(tiny_pairs)


def test_a_row_without_a_caption_draws_from_the_other_texts(pairs_parquet, tiny_processor):
    texts = Texts({"given": ["x"], "captions": []}, {"given": 1.0, "captions": 1.0})
    processors = (tiny_processor.tokenizer, tiny_processor.image_processor)
    collator = PairCollator(*processors, augmentation=Augmentation(), texts=texts)
    drawn = {
        caption: Counter(collator.text({"caption": caption}, random.Random(seed)) for seed in range(200))
        for caption in ("own", None, "")
    }
    assert drawn[None] == drawn[""] == {"x": 200} and 70 < drawn["own"]["own"] < 130


def test_a_stream_is_of_pairs_or_of_images(images, pairs_tars, queries):
    with pytest.raises(ValueError, match="A stream is of one source; leave out streaming, or one of"):
        DataArguments(pairs_tars, train_images=images, streaming=True)
    data = DataArguments(train_images=pairs_tars, streaming=True, train_texts=[queries])
    assert "txt" not in next(iter(training_pairs(data).pairs))


# Runs


@pytest.mark.parametrize("form", ["paths", "pictures", "arrays", "data set", "folder"])
def test_images_of_any_form_are_enough(form, images, tiny_pairs, teacher_folder, queries, tmp_path):
    pictures = [row["image"] for row in tiny_pairs]
    source = {
        "paths": sorted(str(path) for path in (tmp_path / "images").iterdir()),
        "pictures": pictures,
        "arrays": [np.asarray(picture) for picture in pictures],
        "data set": Dataset.from_dict({"image": [{"path": str(path)} for path in (tmp_path / "images").iterdir()]}),
        "folder": images,
    }[form]
    args = arguments(tmp_path / "out", train_texts=[queries])
    result = compress(str(teacher_folder), SMALL, args, train_dataset=source)
    assert result.steps == 2 and result.pairs == 16 and not result.bad_rows


def test_where_nothing_is_paired_the_default_is_the_feature_loss(teacher_folder, tiny_pairs, tmp_path):
    pytest.importorskip("wonderwords")
    pictures = [row["image"] for row in tiny_pairs]
    compress(str(teacher_folder), CALIBRATED, arguments(tmp_path / "out"), pictures)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (
        recipe["losses"] == {"feature": 2000.0} and recipe["train_texts"] == ["words"] and "(losses: feature)" in card
    )
    assert recipe["train_images"].startswith(f"{len(pictures)} rows") and "train_data" not in recipe


@pytest.mark.parametrize(
    ("kind", "paired"),
    [
        (DistillationStageArguments, {"affinity": 1.0}),
        (MaskingStageArguments, {"affinity": 1.0}),
        (MappingStageArguments, {"contrastive": 1.0}),
    ],
)
def test_the_default_losses_depend_on_pairs_and_those_that_are_named_stay(kind, paired):
    assert kind().for_texts(paired=True).losses == paired
    assert kind().for_texts(paired=False).losses == {"feature": 2000.0}
    assert kind(losses={"relational": 3.0}).for_texts(paired=False).losses == {"relational": 3.0}


def test_operators_and_masks_are_trained_where_nothing_is_paired(teacher_folder, images, queries, tmp_path):
    narrow = dataclasses.replace(SMALL, initializer="diagonal", projection_dim=16)  # needs a projector
    compressor = ClipMapCompressor.from_pretrained(str(teacher_folder), student=narrow)
    args = MappingArguments(str(tmp_path / "map"), max_steps=2, batch_size=8, train_texts=[queries])
    trainer = MappingTrainer(compressor, args, images)
    assert trainer.args.losses == {"feature": 2000.0} and trainer.train().steps == 2
    masking = MaskingStageArguments(max_steps=2, batch_size=8)
    args, plain = arguments(tmp_path / "out", train_texts=[queries]), dataclasses.replace(SMALL, initializer=None)
    assert compress(str(teacher_folder), plain, args, images, masking=masking).steps == 2


def test_ternary_weights_are_trained_where_nothing_is_paired(tiny_teacher, teacher_folder, images, queries, tmp_path):
    args = TernaryArguments(str(tmp_path / "out"), max_steps=2, batch_size=8, train_texts=[queries])
    assert TernaryTrainer(tiny_teacher, str(teacher_folder), args, images).train().steps == 2


def test_pretraining_needs_pairs(tiny_teacher, tiny_processor, tiny_pairs, queries, tmp_path):
    args = PretrainingArguments(str(tmp_path / "out"), train_texts=[queries])
    with pytest.raises(ValueError, match="no teacher to learn from and needs pairs; give train_data, without"):
        PretrainingTrainer(tiny_teacher, args, [row["image"] for row in tiny_pairs], processing_class=tiny_processor)


def test_a_run_of_pairs_and_images_is_resumed_with_both_only(teacher_folder, images, pairs_parquet, queries, tmp_path):
    captions = Dataset.from_parquet(str(pairs_parquet)).select_columns(["image", "caption"])
    alone = Dataset.from_dict({"image": captions["image"]}, features=captions.select_columns(["image"]).features)
    mixed = concatenate_datasets([captions, alone])
    args = arguments(tmp_path / "out", train_texts=["captions", queries])
    assert compress(str(teacher_folder), SMALL, args, mixed).steps == 2
    args = arguments(tmp_path / "out", train_texts=["captions", queries], max_steps=3)
    with pytest.raises(ValueError, match="train_data"):
        compress(str(teacher_folder), SMALL, args, captions)


@pytest.mark.parametrize("texts", [["captions"], ["captions", "queries"]])
def test_calibration_images_without_captions_get_other_texts(
    texts, images, pairs_parquet, queries, tmp_path, teacher_folder
):
    named = [queries if name == "queries" else name for name in texts]
    data = DataArguments(str(pairs_parquet), train_texts=named)
    context = RunContext(RunArguments(str(tmp_path / "out")), data)
    teacher = context.given_teachers(str(teacher_folder))[0]
    batches = list(context.calibration_batches(teacher, CalibrationArguments(images, 8)))
    assert sum(len(batch["pixel_values"]) for batch in batches) == 8
    assert all(("input_ids" in batch) == ("queries" in texts) for batch in batches)


def test_images_are_calibrated_on_themselves_beside_their_texts(
    images, queries, tmp_path, teacher_folder, tiny_processor
):
    data = DataArguments(train_images=images, train_texts=[queries])
    context = RunContext(RunArguments(str(tmp_path / "out")), data)
    teacher = context.given_teachers(str(teacher_folder))[0]
    for source in (None, images):
        (batch,) = context.calibration_batches(teacher, CalibrationArguments(source, 8))
        known = tiny_processor.tokenizer(["red circle", "blue bar"], padding=True, return_tensors="pt")["input_ids"]
        assert all(any(torch.equal(ids, text) for text in known) for ids in batch["input_ids"])


def test_a_single_text_is_too_few_to_start_from_and_two_are_enough(images, teacher_folder, tmp_path):
    args = arguments(tmp_path / "out", max_steps=0)
    with pytest.raises(ValueError, match="calibrate with more pairs, of different texts"):
        compress(str(teacher_folder), CALIBRATED, args, images, text_dataset=["a dog"])
    assert compress(str(teacher_folder), CALIBRATED, args, images, text_dataset=["a dog", "a cat"]).steps == 0


def test_images_that_are_held_out_with_pairs_are_not_trained_on_without_captions(pairs_parquet, queries):
    path = str(pairs_parquet)
    data = DataArguments(path, train_images=path, train_texts=["captions", queries], validation_fraction=0.4)
    trained = {row["image"]["bytes"] for row in training_pairs(data).pairs}
    every = {row["image"]["bytes"] for row in load_pairs(path)}
    held_out = {row["image"]["bytes"] for row in validation_part(load_pairs(path), 0.4, held_out=True)}
    assert held_out and trained == every - held_out


def test_a_picture_that_cannot_be_read_is_a_bad_row(tiny_pairs, teacher_folder, queries, tmp_path):
    pictures = [row["image"] for row in tiny_pairs] * 2
    (tmp_path / "broken.png").write_bytes(b"no image")
    args = arguments(tmp_path / "out", train_texts=[queries], max_steps=6, max_bad_fraction=1.0)
    paths = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        paths.append(tmp_path / f"{index}.png")
    result = compress(str(teacher_folder), SMALL, args, [*paths, tmp_path / "broken.png", tmp_path / "none.png"])
    assert result.bad_rows and isinstance(pictures[0], Image.Image)


# Recipes


@pytest.fixture
def recipe(monkeypatch, teacher_folder, tmp_path):
    """Runs a recipe in this process."""

    def run(name: str, *argv: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        output = [] if name == "cache" else ["--output_dir", str(tmp_path / "out")]
        teacher = [] if name == "pretrain" else ["--teacher", str(teacher_folder)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *teacher, *output, *map(str, argv)])
        load_recipe(name).main()

    return run


def options(stage: str) -> list[str]:
    return [f"--{stage}_steps", "2", f"--{stage}_batch_size", "8"]


SIZES = ["--vision_hidden_size", "32", "--text_hidden_size", "32"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compress", [*SIZES, "--initializer", "manual", *options("distillation")]),
        ("map", [*SIZES, "--initializer", "diagonal", *options("mapping")]),
        ("mask", [*SIZES, *options("masking")]),
        ("ternarize", options("ternary")),
    ],
)
def test_recipes_take_images_and_texts_apart(recipe, name, words, images, queries, tmp_path):
    recipe(name, "--train_images", images, "--train_texts", queries, *words)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    written = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    stage = words[-2].removeprefix("--").removesuffix("_batch_size")
    assert written[stage]["losses"] == {"feature": 2000.0} and written["train_images"] == "images"
    assert written["train_texts"] == ["queries.txt"] and "train_data" not in written


def test_a_teacher_cache_is_made_of_images_and_texts_apart(recipe, images, queries, tmp_path, teacher_folder):
    cache = ["--teacher_cache", tmp_path / "cache", "--views", "2", "--train_images", images, "--train_texts", queries]
    recipe("cache", *cache)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    student = ["--student_model", teacher_folder, *options("distillation")]
    recipe("distill", *cache, *student)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == made


def test_recipe_and_python_make_the_same_of_images_and_texts(recipe, images, queries, tmp_path, teacher_folder):
    words = [*SIZES, "--refit_steps", "0", *options("distillation")]
    recipe("compress", "--train_images", images, "--train_texts", queries, *words)
    args = DistillationArguments(str(tmp_path / "python"), max_steps=2, batch_size=8, train_texts=[queries])
    compress(str(teacher_folder), CALIBRATED, args, images)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "python")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mope", "Pruning errors are of retrieval; give pairs, without train_images and train_texts"),
        ("pretrain", "A tokenizer is learned from captions; give pairs, without train_images and train_texts"),
    ],
)
@pytest.mark.parametrize("source", ["--train_images", "--train_data"])
def test_recipes_that_need_pairs_say_so(recipe, name, words, source, images, queries):
    with pytest.raises(ValueError, match=words):
        recipe(name, source, images, "--train_texts", queries)


def test_pruning_errors_are_of_each_pair_once(recipe, pairs_parquet, tmp_path):
    found = []
    for pairs in (24, 1000):
        recipe("mope", "--train_data", pairs_parquet, "--calibration_pairs", pairs)
        found.append((tmp_path / "out" / "pruning_errors.json").read_text(encoding="utf-8"))
    assert found[0] == found[1]


def test_a_recipe_needs_pairs_or_images(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("compress")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "compress.py: error: Name what to train on: pairs in train_data, or images without captions in train_images."
    )
