"""A student folder where it is used: in transformers' auto classes and pipelines, and in sentence-transformers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor, CLIPVisionModelWithProjection, pipeline

from clipmap_hf import ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.models.features import project_images, project_texts


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory) -> Path:
    """As a compressor writes it."""
    folder = tmp_path_factory.mktemp("student")
    config = ClipMapConfig(vision=TowerConfig(32), text=TowerConfig(32))
    ClipMapCompressor.from_pretrained(teacher_folder, config).save_pretrained(folder, include_map=False)
    return folder


@pytest.fixture(scope="module")
def student(student_folder) -> CLIPModel:
    return CLIPModel.from_pretrained(student_folder).eval()


@pytest.fixture(scope="module")
def images(tiny_pairs) -> list:
    return [row["image"] for row in tiny_pairs[:4]]


@pytest.fixture(scope="module")
def image_embeds(student, tiny_processor, images) -> torch.Tensor:
    """Of `images`, as the student projects them."""
    with torch.no_grad():
        return project_images(student, tiny_processor(images=images, return_tensors="pt")["pixel_values"])


def test_the_auto_classes_find_model_and_processor(student_folder, student, image_embeds, images):
    model, processor = (auto.from_pretrained(student_folder) for auto in (AutoModel, AutoProcessor))
    assert type(model) is CLIPModel and type(processor) is CLIPProcessor
    with torch.no_grad():
        embeds = project_images(model.eval(), processor(images=images, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(embeds, image_embeds, atol=1e-6, rtol=0)


def test_the_feature_pipeline_gives_the_embeddings_of_images(student_folder, image_embeds, images):
    vision = CLIPVisionModelWithProjection.from_pretrained(student_folder)
    extract = pipeline("image-feature-extraction", model=vision, image_processor=str(student_folder), device="cpu")
    embeds = torch.tensor(extract(images)).squeeze(1)
    torch.testing.assert_close(embeds, image_embeds, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_sentence_transformers_gives_the_same_embeddings(
    student_folder, student, tiny_processor, tiny_pairs, images, image_embeds
):
    from sentence_transformers import SentenceTransformer

    captions = [row["caption"] for row in tiny_pairs] + ["much longer than the context of this model"]
    tokens = tiny_processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        text_embeds = project_texts(student, **tokens)
    loaded = SentenceTransformer(str(student_folder), device="cpu")
    for found, expected in ((loaded.encode(images), image_embeds), (loaded.encode(captions), text_embeds)):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
