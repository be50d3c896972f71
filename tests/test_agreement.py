"""How far a student agrees with its teacher where nothing is paired."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from clipmap_hf import evaluate_agreement
from clipmap_hf.evaluation.agreement import agreement


TEXTS = ["red circle", "blue bar", "green square", "a dog", "a cat"]


def embeds(images: int, texts: int, seed: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(number, width, generator=generator), dim=-1) for number in (images, texts))


def test_a_model_agrees_with_itself():
    teacher = embeds(30, 7, seed=0)
    found = agreement(teacher, teacher)
    assert found.keys() == {
        *("image_neighbors", "text_neighbors", "decisions", "mean_agreement", "image_cosine", "text_cosine")
    }
    assert all(value == pytest.approx(1.0, abs=1e-6) for value in found.values())


def test_shares_are_those_of_plain_loops(monkeypatch):
    monkeypatch.setattr("clipmap_hf.evaluation.agreement._CHUNK", 4)
    student, teacher = embeds(11, 9, seed=1), embeds(11, 9, seed=2)

    def nearest(one: torch.Tensor, others: list[torch.Tensor]) -> int:
        return max(range(len(others)), key=lambda i: float("-inf") if others[i] is one else float(one @ others[i]))

    def choices(images: torch.Tensor, texts: torch.Tensor) -> dict[str, list[int]]:
        images, texts = list(images), list(texts)
        return {
            "image_neighbors": [nearest(image, images) for image in images],
            "text_neighbors": [nearest(text, texts) for text in texts],
            "decisions": [nearest(image, texts) for image in images],
        }

    found, by_student, by_teacher = agreement(student, teacher), choices(*student), choices(*teacher)
    for name in by_student:
        equal = [one == other for one, other in zip(by_student[name], by_teacher[name], strict=True)]
        assert found[name] == pytest.approx(sum(equal) / len(equal))
    assert found["image_cosine"] == pytest.approx((student[0] * teacher[0]).sum(dim=-1).mean().item(), abs=1e-6)


def test_models_of_other_widths_are_compared_without_cosines():
    found = agreement(embeds(8, 5, seed=0), embeds(8, 5, seed=0, width=4))
    assert found.keys() == {"image_neighbors", "text_neighbors", "decisions", "mean_agreement"}


@pytest.mark.parametrize(("student", "teacher"), [((8, 5), (7, 5)), ((8, 1), (8, 1)), ((1, 5), (1, 5))])
def test_too_few_or_other_items_are_an_error(student, teacher):
    with pytest.raises(ValueError, match="give both the same, of each at least two"):
        agreement(embeds(*student, seed=0), embeds(*teacher, seed=0))


def test_images_without_captions_and_any_texts_are_enough(tiny_teacher, tiny_processor, tiny_pairs, tmp_path):
    for index, row in enumerate(tiny_pairs):
        row["image"].save(tmp_path / f"{index:02d}.png")
    student = copy.deepcopy(tiny_teacher)
    with torch.no_grad():
        student.visual_projection.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = evaluate_agreement(student, tiny_teacher, str(tmp_path), TEXTS, processor=tiny_processor, batch_size=5)
    assert found["text_neighbors"] == 1 and found["text_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["image_cosine"] < 0.9 and found["mean_agreement"] < 1
    pixels = tiny_processor(images=[row["image"] for row in tiny_pairs], return_tensors="pt")["pixel_values"]
    tokens = tiny_processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = [model(pixel_values=pixels, **tokens) for model in (student, tiny_teacher)]
    chosen = [output.logits_per_image.argmax(dim=1) for output in outputs]
    assert found["decisions"] == pytest.approx((chosen[0] == chosen[1]).float().mean().item())


def test_an_image_that_cannot_be_read_is_an_error(tiny_teacher, tiny_processor, tiny_pairs):
    pairs = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}] * 3})
    with pytest.raises(ValueError, match="^3 images cannot be read"):
        evaluate_agreement(tiny_teacher, tiny_teacher, pairs, TEXTS, processor=tiny_processor)
