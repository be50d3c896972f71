"""Students for a fixed list of texts: the list, the stage, the folder that is written, and what reads it."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from conftest import randomize
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPModel, CLIPVisionModelWithProjection

import clipmap_hf
from clipmap_hf import ClipMapConfig, DistillationArguments, LabelTrainer, MappingStageArguments, TowerConfig, compress
from clipmap_hf.data.labels import load_labels
from clipmap_hf.data.texts import load_texts
from clipmap_hf.evaluation.zero_shot import DEFAULT_TEMPLATES
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.models.label_model import load_label_model
from clipmap_hf.models.vision_tower import vision_tower, with_vision
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.stages.labels import LabelStage


SMALL = ClipMapConfig(TowerConfig(hidden_size=32), TowerConfig(hidden_size=32), initializer="diagonal")
RECIPES = Path(clipmap_hf.__file__).parents[1] / "recipes"
LABELS = ["red circle", "blue bar", "green square", "a dog", "a cat"]


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("red circle\n\n  blue bar \nred circle\n")
    return path


# The list


def test_lines_are_queries_as_they_are_each_once(names):
    labels = load_labels(str(names))
    assert labels.names == ["red circle", "blue bar"] and labels.templates == ("{}",)
    assert labels.texts.distinct == labels.names


def test_class_names_stand_in_clips_prompts(names):
    labels = load_labels(f"labels:{names}")
    assert labels.names == ["red circle", "blue bar"] and labels.templates == DEFAULT_TEMPLATES
    assert labels.texts.digest == load_texts([f"labels:{names}"]).digest


def test_a_column_or_a_list_gives_its_different_texts(pairs_parquet, tiny_pairs):
    assert load_labels(f"{pairs_parquet}:caption").names == [row["caption"] for row in tiny_pairs]
    assert load_labels(["a dog", "a cat", "a dog"]).names == ["a dog", "a cat"]


@pytest.mark.parametrize("given", ["words", "captions", "labels:names.json", "a dog"])
def test_what_names_no_list_is_refused_with_what_does(given):
    with pytest.raises(ValueError, match=f"labels='{given}' names no list of texts. Give a text file"):
        load_labels(given)


def test_one_label_is_too_few(tmp_path):
    (tmp_path / "one.txt").write_text("a dog\na dog\n")
    for given in (str(tmp_path / "one.txt"), ["a dog"]):
        with pytest.raises(ValueError, match=r"The labels are \['a dog'\]; .* at least two different"):
            load_labels(given)
    with pytest.raises(ValueError, match=r"The labels are \[\]"):
        load_labels([])


# The tower


def test_a_tower_alone_gives_the_images_of_its_model_and_shares_its_weights(tiny_teacher, tiny_batch):
    tower = vision_tower(tiny_teacher)
    with torch.no_grad():
        expected = tiny_teacher.get_image_features(pixel_values=tiny_batch["pixel_values"]).pooler_output
        found = tower(pixel_values=tiny_batch["pixel_values"]).image_embeds
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert tower.visual_projection.weight is tiny_teacher.visual_projection.weight


def test_a_student_has_its_own_images_and_its_teachers_texts(tiny_teacher, tiny_batch):
    student = start_mapper(tiny_teacher, SMALL).export()
    for vision in (student, vision_tower(student)):
        with torch.no_grad():
            found, own, theirs = (
                model(**tiny_batch) for model in (with_vision(tiny_teacher, vision), student, tiny_teacher)
            )
        torch.testing.assert_close(found.image_embeds, own.image_embeds, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.text_embeds, theirs.text_embeds, atol=1e-6, rtol=0)


def test_metaclip_2_has_a_tower_and_other_families_are_refused_by_name(metaclip2, siglip, chinese_clip):
    assert type(vision_tower(metaclip2)).__name__ == "MetaClip2VisionModelWithProjection"
    for model in (siglip, chinese_clip):
        with pytest.raises(ValueError, match=f"of type '{model.config.model_type}', .* of \\['clip', 'metaclip_2'\\]"):
            vision_tower(model)


# The stage


@pytest.fixture
def label_embeds(tiny_teacher, tiny_processor) -> torch.Tensor:
    """The teacher's embeddings of the labels, by plain transformers."""
    tokens = tiny_processor.tokenizer(LABELS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return F.normalize(tiny_teacher.get_text_features(**tokens).pooler_output, dim=-1)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_images_of_both_choose_among_the_teachers_texts(tiny_teacher, tiny_batch, label_embeds, cached):
    student = with_vision(tiny_teacher, start_mapper(tiny_teacher, SMALL).export())
    with torch.no_grad():
        images, theirs = (
            F.normalize(model.get_image_features(pixel_values=tiny_batch["pixel_values"]).pooler_output, dim=-1)
            for model in (student, tiny_teacher)
        )
    targets = (30 * theirs @ label_embeds.T).softmax(dim=-1)
    expected = (targets * (targets.log() - (30 * images @ label_embeds.T).log_softmax(dim=-1))).sum(dim=-1).mean()
    options = {"teacher_dims": (32,)} if cached else {"teachers": [tiny_teacher]}
    stage = LabelStage(
        student, label_embeds=[label_embeds], losses={"labels": 1, "feature": 1}, logit_scale=30.0, **options
    ).eval()
    batch = tiny_batch | ({"teacher_embeds": [(theirs, torch.zeros(8, 32))]} if cached else {})
    output = stage([batch])
    torch.testing.assert_close(output["labels"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["feature"], (images - theirs).square().mean(), atol=1e-6, rtol=1e-5)
    chunks = [{name: value[start : start + 4] for name, value in tiny_batch.items()} for start in (0, 4)]
    if not cached:
        torch.testing.assert_close(stage(chunks)["loss"], output["loss"], atol=1e-5, rtol=1e-5)


# Runs


def arguments(folder, **changes) -> DistillationArguments:
    return DistillationArguments(str(folder), **{"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3} | changes)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_images_and_labels_are_enough_for_a_tower(teacher_folder, images, tmp_path, label_embeds, cached):
    folder = tmp_path / "out"
    args = arguments(folder, **({"teacher_cache": str(tmp_path / "cache"), "views": 2} if cached else {}))
    result = compress(str(teacher_folder), SMALL, args, images, labels=LABELS)
    assert result.steps == 2 and result.pairs == 16 and not result.bad_rows
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(line["labels"] + 2000 * line["feature"], rel=1e-5)
    assert line["logit_scale"] == pytest.approx(torch.tensor(2.0).exp().item())  # the teacher's own
    tower, info = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tower.config.hidden_size == 32 and type(result.model) is CLIPVisionModelWithProjection
    torch.testing.assert_close(tower.state_dict(), result.model.state_dict(), rtol=0, atol=0)
    assert json.loads((folder / "labels.json").read_text(encoding="utf-8")) == LABELS
    stored = load_file(folder / "text_embeds.safetensors")
    torch.testing.assert_close(stored["text_embeds"], label_embeds, atol=1e-6, rtol=0)
    assert stored["logit_scale"].item() == pytest.approx(torch.tensor(2.0).exp().item())
    assert AutoImageProcessor.from_pretrained(folder) is not None and not (folder / "tokenizer.json").exists()


def test_a_temperature_of_ones_own_is_trained_at(teacher_folder, images, tmp_path):
    compress(str(teacher_folder), SMALL, arguments(tmp_path / "out", logit_scale=30.0), images, labels=LABELS)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["logit_scale"] == pytest.approx(30)


def test_a_student_learns_to_choose_as_its_teacher(teacher_folder, images, tmp_path):
    args = arguments(tmp_path / "out", max_steps=30, batch_size=24, learning_rate=3e-3, logging_steps=1)
    compress(str(teacher_folder), SMALL, args, images, labels=LABELS)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["labels"] < 0.3 * lines[0]["labels"]


def test_the_same_call_finds_its_result_and_goes_on(teacher_folder, images, tmp_path, no_start):
    first = compress(str(teacher_folder), SMALL, arguments(tmp_path / "out"), images, labels=LABELS).model.state_dict()
    first = {name: value.clone() for name, value in first.items()}
    no_start()
    again = compress(str(teacher_folder), SMALL, arguments(tmp_path / "out"), images, labels=LABELS)
    torch.testing.assert_close(again.model.state_dict(), first, rtol=0, atol=0)
    longer = compress(str(teacher_folder), SMALL, arguments(tmp_path / "out", max_steps=4), images, labels=LABELS)
    assert longer.steps == 4


def test_other_labels_are_another_run(teacher_folder, tiny_teacher, images, tmp_path):
    LabelTrainer(tiny_teacher, str(teacher_folder), arguments(tmp_path / "out"), images, labels=LABELS).train()
    args = arguments(tmp_path / "out", max_steps=4)
    with pytest.raises(ValueError, match="labels"):
        LabelTrainer(tiny_teacher, str(teacher_folder), args, images, labels=LABELS[:3]).train()


def test_captions_are_read_by_the_teachers_text_tower(
    teacher_folder, tiny_teacher, tiny_pairs, pairs_parquet, tmp_path
):
    """So recall is that of texts outside the list, too, whatever the student's own text tower is."""
    args, pairs = arguments(tmp_path / "out", max_steps=0), Dataset.from_parquet(str(pairs_parquet))
    student = start_mapper(tiny_teacher, ClipMapConfig(text=TowerConfig(hidden_size=16))).export()
    trainer = LabelTrainer(student, str(teacher_folder), args, pairs, pairs, labels=LABELS)
    result = trainer.train()
    assert result.metrics == pytest.approx(result.teacher_metrics, abs=1e-6)


def test_several_teachers_teach_together(teacher_folder, tiny_config, tiny_processor, images, tmp_path, label_embeds):
    """Also one of another width; the first one's texts are written."""
    other = tmp_path / "other"
    randomize(CLIPModel(tiny_config(projection_dim=16)), seed=1).save_pretrained(other)
    tiny_processor.save_pretrained(other)
    teachers = [str(teacher_folder), str(other)]
    result = compress(teachers, SMALL, arguments(tmp_path / "out"), images, labels=LABELS)
    assert result.steps == 2
    stored = load_file(tmp_path / "out" / "text_embeds.safetensors")["text_embeds"]
    torch.testing.assert_close(stored, label_embeds, atol=1e-6, rtol=0)


def test_two_labels_of_a_letter_are_enough(teacher_folder, images, tmp_path):
    """Also for a start from activations: those of texts are not asked for."""
    student = dataclasses.replace(SMALL, initializer="calibrated", refit_steps=2)
    compress(str(teacher_folder), student, arguments(tmp_path / "out"), images, labels=["a", "b"])
    assert load_file(tmp_path / "out" / "text_embeds.safetensors")["text_embeds"].shape == (2, 32)


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"args": {"losses": {"contrastive": 1.0}}}, r"losses \['contrastive'\] need captions or a text tower"),
        ({"args": {"losses": {"feature": 1.0, "hidden": 1.0}}}, r"losses \['hidden'\] need captions or a text tower"),
        ({"args": {"freeze": "vision"}}, "has nothing else to train"),
        ({"args": {"train_texts": ["captions"]}}, "leave out train_texts and"),
        ({"args": {"validation_fraction": 0.5}}, "in place of a validation_fraction give eval_data"),
        ({"text_dataset": ["a dog"]}, "leave out train_texts and text_dataset"),
        ({"student": {"params": "1M"}}, "A budget counts both towers"),
        ({"student": ClipMapConfig(projection_dim=16)}, "projection_dim=16, but .* 32 dimensions"),
        ({"mapping": MappingStageArguments(max_steps=1)}, "distilled alone"),
        ({"labels": "names.csv"}, "names no list of texts"),
    ],
)
def test_what_does_not_go_with_labels_is_refused_by_name(changes, says, teacher_folder, images, tmp_path):
    options = {"student": SMALL, "labels": LABELS} | changes
    args = arguments(tmp_path / "out", **options.pop("args", {}))
    with pytest.raises(ValueError, match=says):
        compress(str(teacher_folder), args=args, train_dataset=images, **options)
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_tower_class_is_refused(siglip_folder, images, tmp_path):
    with pytest.raises(ValueError, match="for models of type 'siglip'"):
        compress(str(siglip_folder), SMALL, arguments(tmp_path / "out"), images, labels=LABELS)


def test_the_labels_loss_asks_for_labels(teacher_folder, images, tmp_path):
    args = arguments(tmp_path / "out", losses={"labels": 1.0})
    with pytest.raises(ValueError, match=r"losses \['labels'\] need a fixed list of texts; give labels"):
        compress(str(teacher_folder), SMALL, args, images, text_dataset=LABELS)


# The card


def test_the_code_of_the_card_needs_transformers_alone(teacher_folder, images, tiny_pairs, tmp_path):
    compress(str(teacher_folder), SMALL, arguments(tmp_path / "out"), images, labels=LABELS)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) < 25 and "clipmap_hf" not in code
    image = tiny_pairs[0]["image"]
    image.save(tmp_path / "out" / "animal.jpg")
    alone = "import sys; sys.modules['clipmap_hf'] = None\n" + code
    ran = subprocess.run([sys.executable, "-c", alone], cwd=tmp_path / "out", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    printed = [line.split(" ", 1) for line in ran.stdout.splitlines()]
    assert sorted(label for _, label in printed) == sorted(LABELS)
    weights = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert f"| student | {weights / 1e6:.2f} |" in re.sub(" +", " ", card)
    assert sum(float(score) for score, _ in printed) == pytest.approx(1, abs=0.01)
    assert "Texts outside the list" in card


# What reads the folder


@pytest.fixture(scope="module")
def label_folder(shared_teacher, tiny_processor, pairs_parquet, teacher_folder, tmp_path_factory) -> Path:
    """A student for the captions of the tiny pairs."""
    folder = tmp_path_factory.mktemp("labels") / "out"
    compress(str(teacher_folder), SMALL, arguments(folder), str(pairs_parquet), labels=f"{pairs_parquet}:caption")
    return folder


@pytest.fixture
def evaluate(monkeypatch, capsys, label_folder):
    """Runs the recipe on the student for captions, and returns what it prints by name."""
    spec = spec_from_file_location("evaluate_recipe", RECIPES / "evaluate.py")
    recipe = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, recipe)
    spec.loader.exec_module(recipe)

    def run(*argv) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(label_folder), *map(str, argv)])
        recipe.main()
        lines = capsys.readouterr().out.splitlines()
        return {line.split(": ")[0]: float(line.split(": ")[1]) for line in lines if ": " in line}

    return run


@pytest.fixture
def similarities(label_folder, shared_teacher, tiny_processor, tiny_pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of student and teacher, images and captions, by plain transformers: `(24, 24)` each."""
    tower = CLIPVisionModelWithProjection.from_pretrained(label_folder).eval()
    pixels = tiny_processor(images=[row["image"] for row in tiny_pairs], return_tensors="pt")["pixel_values"]
    tokens = tiny_processor.tokenizer([row["caption"] for row in tiny_pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = shared_teacher(pixel_values=pixels, **tokens)
        own = F.normalize(tower(pixel_values=pixels).image_embeds, dim=-1)
    return own @ output.text_embeds.T, output.image_embeds @ output.text_embeds.T


def test_captions_of_the_list_are_retrieved(evaluate, similarities, pairs_parquet):
    found = evaluate("--eval_data", pairs_parquet)
    student, _ = similarities
    right = student.argsort(dim=1, descending=True) == torch.arange(24)[:, None]
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(
            right[:, :k].any(dim=1).float().mean().item(), abs=1e-4
        )


def test_labels_of_the_list_are_classes(evaluate, similarities, pairs_parquet):
    found = evaluate("--eval_data", pairs_parquet, "--label_column", "caption")
    right = similarities[0].argmax(dim=1) == torch.arange(24)
    assert found["accuracy@1"] == pytest.approx(right.float().mean().item(), abs=1e-4)


def test_a_student_agrees_with_its_teacher_on_its_own_list(evaluate, similarities, pairs_parquet, teacher_folder):
    found = evaluate("--eval_data", pairs_parquet, "--agreement_with", teacher_folder)
    assert found.keys() == {"image_neighbors", "decisions", "image_cosine"}
    student, teacher = (scores.argmax(dim=1) for scores in similarities)
    assert found["decisions"] == pytest.approx((student == teacher).float().mean().item(), abs=1e-4)


def test_a_caption_that_is_not_in_the_list_is_named(evaluate, tiny_pairs, tmp_path):
    path = tmp_path / "pairs.parquet"
    rows = {"image": [tiny_pairs[0]["image"]] * 2, "caption": ["red circle", "a dog"]}
    Dataset.from_dict(rows).to_parquet(path)
    with pytest.raises(ValueError, match=r"1 of 2 texts are not among the 24 labels of this model.*: \['a dog'\]"):
        evaluate("--eval_data", path)


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (("--sets", "cifar10", "--output", "x"), "sets"),
        (("--eval_data", "x", "--index_model", "y"), "index_model"),
        (("--eval_data", "x", "--agreement_with", "y", "--texts", "words"), "texts"),
        (("--eval_data", "x", "--label_column", "y", "--templates", "a {}"), "templates"),
    ],
)
def test_other_texts_cannot_be_asked(evaluate, argv, asked):
    with pytest.raises(ValueError, match=rf"is a student for a fixed list of texts, and \['{asked}'\] ask for others"):
        evaluate(*argv)


def test_files_that_do_not_belong_together_are_an_error(label_folder, tmp_path):
    shutil.copytree(label_folder, tmp_path / "copy")
    (tmp_path / "copy" / "labels.json").write_text('["a dog"]')
    with pytest.raises(ValueError, match=r"do not belong together: 1 labels, text embeddings \(24, 32\)"):
        load_label_model(str(tmp_path / "copy"))


def test_a_whole_student_takes_the_place_of_one_for_labels(label_folder, tiny_teacher, tiny_processor, tmp_path):
    shutil.copytree(label_folder, tmp_path / "copy")
    write_student_folder(tmp_path / "copy", tiny_teacher, tiny_processor)
    assert not {"labels.json", "text_embeds.safetensors"} & {path.name for path in (tmp_path / "copy").iterdir()}
