import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from clipmap_hf.evaluation.zero_shot import (
    DEFAULT_TEMPLATES,
    evaluate_zero_shot,
    zero_shot_classifier,
    zero_shot_metrics,
)
from clipmap_hf.models.features import encode_images


CLASSES = ["dog", "a cat", "owl"]
TEMPLATES = ["a {}", "{}!", "no {} or {}"]


def test_classifier_is_the_normalized_mean_of_normalized_prompts(tiny_teacher, tiny_tokenizer):
    classifier = zero_shot_classifier(tiny_teacher, tiny_tokenizer, CLASSES, TEMPLATES)
    rows = []
    for name in CLASSES:
        prompts = [f"a {name}", f"{name}!", f"no {name} or {name}"]
        tokens = [tiny_tokenizer(prompt, truncation=True, return_tensors="pt") for prompt in prompts]  # unpadded
        with torch.no_grad():
            embeds = [F.normalize(tiny_teacher.get_text_features(**one).pooler_output, dim=-1) for one in tokens]
        rows.append(F.normalize(torch.cat(embeds).mean(dim=0), dim=-1))
    torch.testing.assert_close(classifier, torch.stack(rows), atol=1e-5, rtol=0)


def test_classifier_does_not_depend_on_the_batch_size(tiny_teacher, tiny_tokenizer):
    whole = zero_shot_classifier(tiny_teacher, tiny_tokenizer, CLASSES, TEMPLATES)
    parts = zero_shot_classifier(tiny_teacher, tiny_tokenizer, CLASSES, TEMPLATES, batch_size=2)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_classifier_leaves_mode_and_gradients_alone(tiny_teacher, tiny_tokenizer):
    tiny_teacher.train()
    classifier = zero_shot_classifier(tiny_teacher, tiny_tokenizer, CLASSES)
    assert tiny_teacher.training and not classifier.requires_grad
    assert classifier.shape == (3, tiny_teacher.config.projection_dim)


def test_classifier_and_evaluation_run_without_dropout(model_with_dropout, tiny_tokenizer, tiny_batch):
    first, second = (zero_shot_classifier(model_with_dropout, tiny_tokenizer, CLASSES) for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    pixels = tiny_batch["pixel_values"]
    classifier = encode_images(model_with_dropout.eval(), pixels).detach()
    batches = [{"pixel_values": pixels, "labels": torch.arange(8)}]
    assert evaluate_zero_shot(model_with_dropout.train(), batches, classifier)["accuracy@1"] == 1.0


def test_braces_elsewhere_in_a_template_are_kept(tiny_teacher, tiny_tokenizer):
    classifier = zero_shot_classifier(tiny_teacher, tiny_tokenizer, ["owl"], ["{x} {}"])
    expected = zero_shot_classifier(tiny_teacher, tiny_tokenizer, ["{x} owl"], ["{}"])
    torch.testing.assert_close(classifier, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("classnames", "templates", "message"),
    [
        ([], DEFAULT_TEMPLATES, r"classnames=\[\]"),
        ("dog", DEFAULT_TEMPLATES, "classnames='dog' must be a list"),
        (CLASSES, [], r"templates=\[\]"),
        (CLASSES, "a {}", "templates='a {}' must be a list"),
        (CLASSES, ["a {}", "a photo"], "Template 'a photo' has no '{}'"),
    ],
)
def test_wrong_classes_and_templates_are_errors(tiny_teacher, tiny_tokenizer, classnames, templates, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(tiny_teacher, tiny_tokenizer, classnames, templates)


def test_accuracy_of_hand_made_ranks():
    logits = torch.arange(7.0).flip(0).repeat(4, 1)  # class 0 scores best, class 6 worst
    metrics = zero_shot_metrics(logits, torch.tensor([0, 4, 5, 6]))
    assert metrics == {"accuracy@1": 0.25, "accuracy@5": 0.5, "mean_per_class_recall": 0.25}


def test_accuracy_at_5_of_three_classes_is_accuracy_at_3():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert zero_shot_metrics(logits, torch.tensor([2]))["accuracy@5"] == 1.0


def test_mean_per_class_recall_weighs_the_classes_that_occur_equally():
    logits = torch.eye(4)[[0, 0, 0, 0]]  # always class 0
    metrics = zero_shot_metrics(logits, torch.tensor([0, 0, 0, 2]))
    assert metrics["accuracy@1"] == 0.75
    assert metrics["mean_per_class_recall"] == 0.5


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_constant_scores_are_never_right(value):
    metrics = zero_shot_metrics(torch.full((10, 10), value), torch.arange(10))
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]], ids=str)
def test_labels_out_of_range_are_an_error(labels):
    with pytest.raises(ValueError, match=r"Labels \[(3|-1)\] are outside 0 … 2"):
        zero_shot_metrics(torch.eye(3)[:2], torch.tensor(labels))


@pytest.mark.parametrize(("images", "labels"), [(2, 3), (0, 0)])
def test_labels_that_do_not_fit_the_scores_are_an_error(images, labels):
    with pytest.raises(ValueError, match="at least one image"):
        zero_shot_metrics(torch.zeros(images, 3), torch.zeros(labels, dtype=torch.long))


def test_evaluation_finds_each_image_in_a_classifier_of_its_own_embeddings(tiny_teacher, tiny_batch):
    pixels = tiny_batch["pixel_values"]
    with torch.no_grad():
        classifier = encode_images(tiny_teacher, pixels)
    tiny_teacher.train()

    def evaluate(labels: torch.Tensor) -> dict[str, float]:
        parts = (slice(0, 5), slice(5, 8))
        batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in parts]
        return evaluate_zero_shot(tiny_teacher, batches, classifier)

    assert evaluate(torch.arange(8))["accuracy@1"] == 1.0
    assert evaluate(torch.arange(8).roll(1))["accuracy@1"] == 0.0
    assert tiny_teacher.training


def test_evaluation_without_batches_is_an_error(tiny_teacher):
    with pytest.raises(ValueError, match="at least one image"):
        evaluate_zero_shot(tiny_teacher, [], torch.eye(3, 32))


def test_labeled_images_are_read_from_a_path_or_a_data_set(tiny_teacher, tiny_processor, pairs_parquet):
    rows = Dataset.from_parquet(str(pairs_parquet))
    names = sorted(set(rows["caption"]))
    classifier = zero_shot_classifier(tiny_teacher, tiny_processor.tokenizer, names)
    pixels = tiny_processor.image_processor(list(rows["image"]), return_tensors="pt")["pixel_values"]
    labels = torch.tensor([names.index(caption) for caption in rows["caption"]])
    expected = evaluate_zero_shot(tiny_teacher, [{"pixel_values": pixels, "labels": labels}], classifier)
    for images in (pairs_parquet, rows):
        given = evaluate_zero_shot(tiny_teacher, images, processor=tiny_processor, label_column="caption")
        assert given == pytest.approx(expected)


def test_numbered_classes_are_named_in_order(tiny_teacher, tiny_processor, pairs_parquet):
    rows = Dataset.from_parquet(str(pairs_parquet))
    names = sorted(set(rows["caption"]))
    numbered = rows.add_column("cls", [names.index(caption) for caption in rows["caption"]])
    reading = {"processor": tiny_processor, "label_column": "cls"}
    given = evaluate_zero_shot(tiny_teacher, numbered, classnames=names, **reading)
    assert given == evaluate_zero_shot(tiny_teacher, rows, processor=tiny_processor, label_column="caption")
    with pytest.raises(ValueError, match="Column 'cls' holds int64"):
        evaluate_zero_shot(tiny_teacher, numbered, **reading)


def test_images_need_a_processor_and_batches_a_classifier(tiny_teacher, pairs_parquet):
    with pytest.raises(TypeError, match="need processor="):
        evaluate_zero_shot(tiny_teacher, pairs_parquet, label_column="caption")
    with pytest.raises(TypeError, match="need a classifier"):
        evaluate_zero_shot(tiny_teacher, [])
