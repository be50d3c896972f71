"""Texts that images are trained beside without belonging to them."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset

from clipmap_hf import ClipMapConfig, DistillationArguments, DistillationTrainer, TowerConfig, compress
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.captions import caption_text
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.texts import Texts, load_texts
from clipmap_hf.data.words import word_texts
from clipmap_hf.evaluation.zero_shot import DEFAULT_TEMPLATES
from clipmap_hf.losses import check_texts


SMALL = ClipMapConfig(vision=TowerConfig(hidden_size=32), text=TowerConfig(hidden_size=32))


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("red circle\n\n  blue bar \nred circle\n")
    return path


# Where texts come from


def test_a_text_file_has_a_text_a_line(queries):
    assert load_texts([str(queries)]).sources == {str(queries): ["red circle", "blue bar", "red circle"]}


def test_labels_are_class_names_in_clips_prompts(queries):
    (texts,) = load_texts([f"labels:{queries}"]).sources.values()
    assert texts[: len(DEFAULT_TEMPLATES)] == [template.replace("{}", "red circle") for template in DEFAULT_TEMPLATES]


def test_a_column_gives_its_different_texts(pairs_parquet, tiny_pairs):
    (captions,) = load_texts([f"{pairs_parquet}:caption"]).sources.values()
    assert captions == [row["caption"] for row in tiny_pairs]
    (keywords,) = load_texts([f"{pairs_parquet}:keywords"]).sources.values()
    assert sorted(keywords) == sorted({word for row in tiny_pairs for word in row["keywords"]})
    with pytest.raises(ValueError, match=r"no column 'title'; it has \['image', 'caption', 'keywords'\]"):
        load_texts([f"{pairs_parquet}:title"])


def test_words_are_short_different_and_the_same_for_a_seed():
    pytest.importorskip("wonderwords")
    texts = word_texts(2000)
    assert texts == word_texts(2000) and texts[:100] == word_texts(100) and len(set(texts)) == 2000
    assert texts != word_texts(2000, seed=1)
    lengths = Counter(len(text.split()) for text in texts)
    assert set(lengths) <= set(range(1, 9)) and 2 < sum(n * k for n, k in lengths.items()) / 2000 < 4
    assert not any(re.search(r"\ba [aeiou]", text) for text in texts)


@pytest.mark.parametrize("name", ["queries.csv", "word", "captions.parquet", "labels.json"])
def test_a_source_that_is_none_is_refused_with_what_is_allowed(name):
    with pytest.raises(
        ValueError, match=f"train_texts='{name}' names no texts. Allowed are .* 'words', and 'captions'"
    ):
        load_texts([name])


@pytest.mark.parametrize("weight", ["0.1", "1234567.25", "3", "1e-09"])
def test_names_and_weights_give_the_same_texts_again(queries, weight):
    first = load_texts(["captions", f"{queries}={weight}"])
    assert load_texts(first.names).digest == first.digest and load_texts(first.names).names == first.names


def test_empty_sources_doubled_names_and_wrong_weights_are_errors(tmp_path, queries):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="There are no texts in"):
        load_texts([str(tmp_path / "empty.txt")])
    with pytest.raises(ValueError, match="named twice; give them a weight"):
        load_texts([str(queries), f"{queries}=2"])
    with pytest.raises(ValueError, match=r"have the weight 0\.0; it must be above 0"):
        load_texts([f"{queries}=0"])
    with pytest.raises(TypeError, match="are the one string 'a red circle'; give a list"):
        load_texts([], "a red circle")


def test_texts_are_drawn_by_weight():
    texts = Texts({"a": ["1", "2"], "captions": []}, {"a": 3.0, "captions": 1.0})
    rng = random.Random(0)
    drawn = Counter(texts.draw(rng) for _ in range(4000))
    assert drawn.keys() == {"1", "2", None} and 0.22 < drawn[None] / 4000 < 0.28
    assert texts.has_captions and not texts.pairs and Texts({"captions": []}, {"captions": 1.0}).pairs


def test_other_texts_or_weights_have_another_digest(queries):
    one, again, other = (load_texts([word]).digest for word in (str(queries), f"{queries}=1", f"{queries}=2"))
    assert one == again != other


# Batches


@pytest.fixture
def collator(tiny_processor):
    def make(texts: Texts, **options) -> PairCollator:
        processors = (tiny_processor.tokenizer, tiny_processor.image_processor)
        return PairCollator(*processors, augmentation=Augmentation(), texts=texts, **options)

    return make


@pytest.fixture
def rows(pairs_parquet) -> list[dict]:
    return [row | {"epoch": 3} for row in load_pairs(str(pairs_parquet))]


def test_an_image_has_the_same_view_and_a_text_that_is_drawn(collator, rows, tiny_processor):
    texts = Texts({"given": ["red circle"]}, {"given": 1.0})
    batch, paired = collator(texts)(rows), collator(None)(rows)
    torch.testing.assert_close(batch["pixel_values"], paired["pixel_values"], rtol=0, atol=0)
    expected = tiny_processor.tokenizer(["red circle"] * len(rows), return_tensors="pt")["input_ids"]
    torch.testing.assert_close(batch["input_ids"], expected, rtol=0, atol=0)


def test_the_own_caption_is_one_of_the_sources(collator, rows):
    texts = Texts({"given": ["x"], "captions": []}, {"given": 1.0, "captions": 1.0})
    own = collator(texts)
    drawn = [own.text(row, random.Random(index)) for index, row in enumerate(rows)]
    assert {"x"} < set(drawn) <= {"x", *(caption_text(row["caption"]) for row in rows)}


def test_images_without_captions_are_enough(collator, rows):
    images = [{"image": row["image"], "epoch": 0} for row in rows]
    batch = collator(Texts({"given": ["x"]}, {"given": 1.0}))(images)
    assert len(batch["input_ids"]) == len(images) and batch["bad_rows"] == {}


def test_columns_of_captions_are_read_if_they_are_a_source(queries):
    assert DataArguments("pairs").read_columns == ["caption"]
    assert DataArguments("pairs", train_texts=[str(queries)]).read_columns == []
    assert DataArguments("pairs", train_texts=[str(queries), "captions"]).read_columns == ["caption"]


# Runs


def arguments(folder, **changes) -> DistillationArguments:
    numbers = {"max_steps": 2, "batch_size": 8, "losses": {"feature": 2000}, "learning_rate": 1e-3}
    return DistillationArguments(str(folder), **numbers | changes)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_a_folder_of_images_and_a_list_of_texts_are_enough(teacher_folder, images, queries, tmp_path, cached):
    cache = {"teacher_cache": str(tmp_path / "cache"), "views": 2} if cached else {}
    args = arguments(tmp_path / "out", train_texts=[str(queries)], **cache)
    result = compress(str(teacher_folder), SMALL, args, train_dataset=images, text_dataset=["green bar", "a dog"])
    assert result.steps == 2 and result.pairs == 16 and not result.bad_rows
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert all(torch.tensor(json.loads(line).get("loss", 0.0)).isfinite() for line in lines)


def test_texts_decide_the_start_and_the_student(teacher_folder, images, tmp_path):
    students = []
    for name, texts in (("a", ["red circle", "blue bar"]), ("b", ["a dog", "two cats", "a tree"])):
        args = arguments(tmp_path / name, max_steps=0)
        students.append(compress(str(teacher_folder), SMALL, args, train_dataset=images, text_dataset=texts).model)
    projections = [student.text_projection.weight for student in students]
    assert not torch.equal(*projections)
    torch.testing.assert_close(
        *(student.visual_projection.weight for student in students), rtol=0, atol=0, msg="images are the same"
    )


@pytest.mark.parametrize("loss", ["contrastive", "interactive", "sigmoid"])
def test_a_loss_of_pairs_is_refused_with_those_that_are_not(loss, tiny_teacher, teacher_folder, images, tmp_path):
    with pytest.raises(
        ValueError, match=rf"\['{loss}'\] need texts .* Take of \['affinity', 'feature', 'hidden', 'rel"
    ):
        check_texts({"feature": 1.0, loss: 1.0}, paired=False)
    check_texts({"feature": 1.0, loss: 0.0}, paired=False)
    trainer = DistillationTrainer(
        tiny_teacher,
        str(teacher_folder),
        arguments(tmp_path / "out", losses={loss: 1.0}),
        train_dataset=images,
        text_dataset=["a dog"],
    )
    with pytest.raises(ValueError, match=f"{loss}"):
        trainer.train()


def test_captions_alone_are_pairs(pairs_parquet, teacher_folder, tiny_teacher, tmp_path):
    args = arguments(tmp_path / "out", train_texts=["captions"], losses={"contrastive": 1.0})
    trainer = DistillationTrainer(tiny_teacher, str(teacher_folder), args, train_dataset=str(pairs_parquet))
    assert trainer.train().steps == 2


@pytest.mark.parametrize("initializer", ["taylor", "mope"])
def test_a_start_of_pairs_is_refused_with_those_that_are_not(initializer, teacher_folder, images, tmp_path):
    student = ClipMapConfig(vision=SMALL.vision, text=SMALL.text, initializer=initializer)
    with pytest.raises(ValueError, match=rf"initializer='{initializer}' needs texts that belong .* \['calibrated', "):
        compress(str(teacher_folder), student, arguments(tmp_path / "out"), images, text_dataset=["a dog"])


def test_other_texts_are_another_run(teacher_folder, tiny_teacher, images, tmp_path):
    def trainer(texts: list[str], steps: int) -> DistillationTrainer:
        args = arguments(tmp_path / "out", max_steps=steps)
        return DistillationTrainer(tiny_teacher, str(teacher_folder), args, train_dataset=images, text_dataset=texts)

    trainer(["a dog", "a cat"], 2).train()
    with pytest.raises(ValueError, match="digest_of_texts"):
        trainer(["a dog"], 4).train()


def test_pairs_and_texts_that_are_mixed_train_too(pairs_parquet, teacher_folder, tiny_teacher, tmp_path, queries):
    args = arguments(tmp_path / "out", train_texts=["captions", f"{queries}=2"])
    pairs = Dataset.from_parquet(str(pairs_parquet))
    trainer = DistillationTrainer(tiny_teacher, str(teacher_folder), args, train_dataset=pairs, eval_dataset=pairs)
    result = trainer.train()
    assert result.steps == 2 and "mean_recall" in result.metrics
