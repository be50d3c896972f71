import pytest
import torch
from torch.nn import functional as F

from clipmap_hf.evaluation.metric import RetrievalRecall
from clipmap_hf.evaluation.retrieval import recall_at_k


@pytest.fixture
def metric(tmp_path) -> RetrievalRecall:
    return RetrievalRecall(cache_dir=str(tmp_path))


@pytest.fixture
def embeds() -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(6, 8)` and noisy copies of them as texts, so that recall is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 8, generator=generator)
    texts = images + 1.5 * torch.randn(6, 8, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def test_metric_equals_recall_at_k(metric, embeds):
    images, texts = embeds
    expected = recall_at_k(images, texts, ks=(1, 2))
    metric.add_batch(image_embeds=images.numpy(), text_embeds=texts.numpy(), image_ids=list(range(6)))
    assert metric.compute(ks=[1, 2]) == expected
    assert 0 < expected["image_to_text_recall@1"] < 1


def test_batches_added_in_pieces_with_ids_in_any_order(metric, embeds):
    images, texts = embeds
    ids = [30, 10, 50, 20, 60, 40]
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.add_batch(image_embeds=images[part].tolist(), text_embeds=texts[part].tolist(), image_ids=ids[part])
    assert metric.compute() == recall_at_k(images, texts)


def test_an_image_is_added_once_per_caption(metric, embeds):
    images, texts = embeds
    owner = [0, 1, 0, 2, 1, 2]
    metric.add_batch(image_embeds=images[owner].numpy(), text_embeds=texts.numpy(), image_ids=owner)
    assert metric.compute(ks=[1, 2]) == recall_at_k(images[:3], texts, torch.tensor(owner), ks=(1, 2))


def test_examples_are_added_one_by_one(metric, embeds):
    images, texts = embeds
    for index in range(6):
        metric.add(image_embeds=images[index].tolist(), text_embeds=texts[index].tolist(), image_ids=index)
    assert metric.compute(ks=[1]) == recall_at_k(images, texts, ks=(1,))
