import json

import datasets
import pytest
import torch
from conftest import randomize
from datasets import Dataset
from torch.nn import functional as F
from transformers import CLIPModel

from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.evaluation.retrieval import embed_pairs, evaluate_retrieval, recall_at_k


def random_embeds(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recall_of_hand_made_ranks():
    # Rows: images; columns: texts. The right text of the images ranks 0, 1, 2; the right image of the texts 0, 2, 2.
    scores = torch.tensor([[0.9, 0.5, 0.3], [0.8, 0.4, 0.2], [0.7, 0.6, 0.1]])
    recall = recall_at_k(torch.eye(3), scores.T, ks=(1, 2, 3))
    assert recall == pytest.approx(
        {
            "image_to_text_recall@1": 1 / 3,
            "image_to_text_recall@2": 2 / 3,
            "image_to_text_recall@3": 1.0,
            "text_to_image_recall@1": 1 / 3,
            "text_to_image_recall@2": 1 / 3,
            "text_to_image_recall@3": 1.0,
        }
    )


def test_recall_equals_a_plain_sort():
    images, texts = random_embeds(40, seed=1), random_embeds(40, seed=2)
    order = (images @ texts.T).argsort(dim=1, descending=True).tolist()
    expected = sum(i in row[:5] for i, row in enumerate(order)) / 40
    recall = recall_at_k(images, texts, ks=(5,))
    assert 0 < expected < 1
    assert recall["image_to_text_recall@5"] == pytest.approx(expected)


def test_a_constant_embedding_scores_zero():
    constant = F.normalize(torch.ones(20, 8), dim=-1)
    assert set(recall_at_k(constant, constant).values()) == {0.0}


def test_nan_embeddings_score_zero():
    nan = torch.full((20, 8), torch.nan)
    assert set(recall_at_k(nan, nan).values()) == {0.0}


def test_an_image_is_found_by_any_of_its_captions():
    images = torch.eye(2)
    texts = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.5], [0.1, 0.4]])  # captions 0 and 2 are image 0's
    recall = recall_at_k(images, texts, torch.tensor([0, 1, 0, 1]), ks=(1, 2))
    # image 0's best text is its caption 0; image 1's best is caption 2 (not its), then caption 3 (its)
    assert recall["image_to_text_recall@1"] == 0.5
    assert recall["image_to_text_recall@2"] == 1.0
    assert recall["text_to_image_recall@1"] == 1.0


@pytest.mark.parametrize("chunk_size", [1, 7, 30])
def test_chunks_change_nothing(chunk_size):
    images, texts = random_embeds(10, seed=3), random_embeds(30, seed=4)
    owner = torch.arange(30) % 10
    assert recall_at_k(images, texts, owner, chunk_size=chunk_size) == recall_at_k(images, texts, owner)


@pytest.mark.parametrize("owner", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 0]], ids=str)
def test_captions_that_do_not_fit_the_images_are_an_error(owner):
    with pytest.raises(ValueError, match="image_of_text must name one of 3 images for each of 3 texts"):
        recall_at_k(torch.eye(3), torch.eye(3), torch.tensor(owner))


def test_embed_pairs_gives_the_models_embeddings_and_restores_its_mode(tiny_teacher, tiny_batch):
    with torch.no_grad():
        expected = tiny_teacher(**tiny_batch)
    tiny_teacher.train()
    halves = [
        {name: value[part] for name, value in tiny_batch.items()} | {"image_of_text": owners}
        for part, owners in ((slice(0, 3), torch.arange(3)), (slice(3, 8), torch.arange(5)))
    ]
    images, texts, image_of_text = embed_pairs(tiny_teacher, halves)
    assert image_of_text.tolist() == list(range(8))
    assert tiny_teacher.training and not images.requires_grad
    torch.testing.assert_close(images, expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, expected.text_embeds, atol=1e-6, rtol=0)


def test_embed_pairs_runs_without_dropout(model_with_dropout, tiny_batch):
    batch = tiny_batch | {"image_of_text": torch.arange(8)}
    first, second = (embed_pairs(model_with_dropout, [batch]) for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_several_captions_of_an_image_all_count(tiny_teacher, tiny_batch):
    batch = tiny_batch | {"pixel_values": tiny_batch["pixel_values"][:4], "image_of_text": torch.arange(8) // 2}
    images, texts, image_of_text = embed_pairs(tiny_teacher, [batch, batch])
    assert (len(images), len(texts)) == (8, 16) and image_of_text.tolist() == [i // 2 for i in range(16)]
    assert 0 <= evaluate_retrieval(tiny_teacher, [batch])["text_to_image_recall@1"] <= 1


@pytest.mark.parametrize("batches", [[], [{"bad_rows": {"no image": 2}}]], ids=["none", "unreadable"])
def test_an_evaluation_of_nothing_or_of_unreadable_pairs_is_an_error(tiny_teacher, batches):
    with pytest.raises(ValueError, match="no evaluation pairs|2 evaluation pairs cannot be read"):
        evaluate_retrieval(tiny_teacher, batches)


def test_unreadable_pairs_are_counted_to_the_end(tiny_teacher, tiny_batch):
    batch = tiny_batch | {"image_of_text": torch.arange(8)}
    batches = [batch | {"bad_rows": {}}, batch | {"bad_rows": {"no caption": 1}}, {"bad_rows": {"no image": 3}}]
    with pytest.raises(ValueError, match="4 evaluation pairs cannot be read; the log says why"):
        embed_pairs(tiny_teacher, batches)
    assert len(embed_pairs(tiny_teacher, batches[:1])[0]) == 8


def test_mean_recall_averages_all_cut_offs_and_both_ways(tiny_teacher, tiny_batch):
    batch = tiny_batch | {"image_of_text": torch.arange(8)}
    metrics = evaluate_retrieval(tiny_teacher, [batch], ks=(1, 3))
    recall = recall_at_k(*embed_pairs(tiny_teacher, [batch]), ks=(1, 3))
    assert metrics == recall | {"mean_recall": pytest.approx(sum(recall.values()) / 4)}
    assert metrics["mean_recall"] > 0


# Pairs from any source, and an index that exists


def test_pairs_are_read_from_a_path_a_data_set_or_batches(tiny_teacher, tiny_processor, pairs_parquet):
    batches = evaluation_pairs(str(pairs_parquet), tiny_processor)
    expected = evaluate_retrieval(tiny_teacher, batches)
    rows = Dataset.from_parquet(str(pairs_parquet)).rename_columns({"image": "picture", "caption": "alt"})
    columns = {"image_column": "picture", "caption_column": "alt"}
    assert evaluate_retrieval(tiny_teacher, pairs_parquet, processor=tiny_processor) == expected
    assert evaluate_retrieval(tiny_teacher, rows, processor=tiny_processor, batch_size=7, **columns) == expected


def test_reading_needs_a_processor_and_batches_are_read_already(tiny_teacher, pairs_parquet, tiny_processor):
    with pytest.raises(TypeError, match="need processor="):
        evaluate_retrieval(tiny_teacher, pairs_parquet)
    with pytest.raises(TypeError, match=r"\['split'\] say how to read pairs"):
        evaluate_retrieval(tiny_teacher, evaluation_pairs(str(pairs_parquet), tiny_processor), split="train")


def test_an_index_is_searched_by_the_models_queries(tiny_teacher, tiny_config, tiny_processor, pairs_parquet):
    other = randomize(CLIPModel(tiny_config()), seed=3).eval()
    batches = evaluation_pairs(str(pairs_parquet), tiny_processor)
    images, texts, owners = embed_pairs(tiny_teacher, batches)
    image_index, text_index, _ = embed_pairs(other, batches)
    given = evaluate_retrieval(tiny_teacher, batches, ks=(1, 3), index_model=other)
    by_images, by_texts = images @ text_index.T, texts @ image_index.T  # one caption for each image, in order
    for k in (1, 3):
        for direction, scores in (("image_to_text", by_images), ("text_to_image", by_texts)):
            found = (scores.topk(k).indices == owners[:, None]).any(dim=1).float().mean().item()
            assert given[f"{direction}_recall@{k}"] == pytest.approx(found)
    assert evaluate_retrieval(tiny_teacher, batches, index_model=tiny_teacher) == evaluate_retrieval(
        tiny_teacher, batches
    )


def test_an_index_of_another_width_is_refused(tiny_teacher, tiny_config, tiny_processor, pairs_parquet):
    other = CLIPModel(tiny_config(projection_dim=16)).eval()
    with pytest.raises(ValueError, match="they must live in one space"):
        evaluate_retrieval(tiny_teacher, pairs_parquet, processor=tiny_processor, index_model=other)


# Rows that repeat an image


@pytest.fixture
def captioned(tiny_pairs):
    """Ten images with two captions each, and what plain transformers makes of them."""
    images = [row["image"] for row in tiny_pairs[:10]]
    captions = [[f"{index} {row['caption']}", f"{index} x"] for index, row in enumerate(tiny_pairs[:10])]
    return images, captions


def plain_recall(model, processor, images, captions, k: int) -> tuple[float, float]:
    """Recall@k with images once, by transformers and a sort."""
    texts = [text for row in captions for text in row]
    owners = torch.tensor([index for index, row in enumerate(captions) for _ in row])
    inputs = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits_per_image  # (images, texts)
    by_image = owners[scores.argsort(descending=True)[:, :k]] == torch.arange(len(images))[:, None]
    by_text = scores.T.argsort(descending=True)[:, :k] == owners[:, None]
    return by_image.any(dim=1).float().mean().item(), by_text.any(dim=1).float().mean().item()


def written(folder, columns: dict) -> str:
    path = folder / "pairs.parquet"
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("form", ["lists", "flat", "shuffled", "JSON"])
def test_rows_that_repeat_an_image_count_as_one(tiny_teacher, tiny_processor, captioned, tmp_path, form):
    images, captions = captioned
    rows = {
        "lists": [(index, row) for index, row in enumerate(captions)],
        "JSON": [(index, json.dumps(row)) for index, row in enumerate(captions)],
        "flat": [(index, text) for index, row in enumerate(captions) for text in row],
        "shuffled": [(index, row[which]) for which in (1, 0) for index, row in enumerate(captions)],
    }[form]
    columns = {"image": [images[index] for index, _ in rows], "caption": [caption for _, caption in rows]}
    found = evaluate_retrieval(
        tiny_teacher, written(tmp_path, columns), ks=(1, 3), processor=tiny_processor, batch_size=3
    )
    for k in (1, 3):
        of_images, of_texts = plain_recall(tiny_teacher, tiny_processor, images, captions, k)
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(of_images, abs=1e-6)
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(of_texts, abs=1e-6)


def test_an_index_holds_repeated_images_once_too(tiny_teacher, tiny_processor, captioned, tmp_path):
    images, captions = captioned
    columns = {
        "image": [image for image in images for _ in range(2)],
        "caption": [text for row in captions for text in row],
    }
    options = {"processor": tiny_processor, "batch_size": 4}
    path = written(tmp_path, columns)
    alone = evaluate_retrieval(tiny_teacher, path, **options)
    assert evaluate_retrieval(tiny_teacher, path, index_model=tiny_teacher, **options) == alone
