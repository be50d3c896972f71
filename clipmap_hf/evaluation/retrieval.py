"""Image–text retrieval: recall@k in both directions, for images with one or several captions, in one row or more."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.data.pairs import PairSource, holds_pairs
from clipmap_hf.distributed import gather, process_index
from clipmap_hf.models.features import Towers, evaluating


__all__ = [
    "embed_pairs",
    "evaluate_retrieval",
    "evaluate_towers",
    "recall_at_k",
    "recall_columns",
    "retrieval_metrics",
]


def recall_at_k(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_text: torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
    index: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, float]:
    """
    Computes the share of queries that have a match among their `k` nearest results. An image with several captions
    counts as found when any of them is found. Ties (and NaN) count against the model, so constant embeddings score 0.

    Args:
        image_embeds: Normalized embeddings `(images, dim)`.
        text_embeds: Normalized embeddings `(texts, dim)`.
        image_of_text: Index of the image of each text `(texts,)`. By default, text `i` belongs to image `i`.
        ks: Cut-offs.
        chunk_size: Queries to compare at a time. Memory grows with `chunk_size * max(images, texts)`.
        index: Embeddings of the same images and texts by another model, which are searched in place of the model's
            own: images by its texts, texts by its images.

    Returns:
        `{"image_to_text_recall@1": …, "text_to_image_recall@1": …, …}`, between 0 and 1.

    Raises:
        ValueError: If `image_of_text` does not fit the embeddings, an image has no text, or the index has another
            width.
    """
    image_index, text_index = (image_embeds, text_embeds) if index is None else index
    if image_index.shape != image_embeds.shape or text_index.shape != text_embeds.shape:
        raise ValueError(
            f"The index has embeddings {tuple(image_index.shape)} and {tuple(text_index.shape)}, the model "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}; they must live in one space."
        )
    images, texts = len(image_embeds), len(text_embeds)
    if image_of_text is None:
        image_of_text = torch.arange(texts, device=text_embeds.device)
    if len(image_of_text) != texts or set(image_of_text.tolist()) != set(range(images)):
        raise ValueError(
            f"image_of_text must name one of {images} images for each of {texts} texts, and leave out no image; "
            f"got {len(image_of_text)} entries for {len(set(image_of_text.tolist()))} images."
        )
    image_ids = torch.arange(images, device=image_embeds.device)
    ranks = {
        "image_to_text": _ranks(image_embeds, text_index, image_ids, image_of_text, chunk_size),
        "text_to_image": _ranks(text_embeds, image_index, image_of_text, image_ids, chunk_size),
    }
    return {
        f"{direction}_recall@{k}": (rank < k).float().mean().item() for direction, rank in ranks.items() for k in ks
    }


def _ranks(
    queries: torch.Tensor, keys: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Returns how many wrong keys score at least as high as the best right key, for each query: `(queries,)`."""
    ranks = []
    for chunk, ids in zip(queries.split(chunk_size), query_ids.split(chunk_size), strict=True):
        scores = chunk @ keys.T  # (chunk, keys)
        right = ids[:, None] == key_ids[None, :]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(scores < best) & ~right).sum(dim=1))  # `~(a < b)`, not `a >= b`: NaN counts as high
    return torch.cat(ranks)


def embed_pairs(model: nn.Module, batches: Iterable[Mapping]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Embeds collated pairs. The model runs in eval mode. Every process passes its own batches and receives the
    embeddings of all processes.

    Args:
        model: A `CLIPModel`.
        batches: Batches of a `PairCollator`.

    Returns:
        Normalized image embeddings `(images, dim)`, normalized text embeddings `(texts, dim)`, and the index of the
        image of each text `(texts,)`, all on the CPU.

    Raises:
        ValueError: If there are no pairs, or the collator left out a row: results on fewer pairs would not be
            comparable.
    """
    with evaluating(model):
        (embeds,), image_of_text = _embed([Towers.of_model(model)], batches)
        return *embeds, image_of_text


def evaluate_retrieval(
    model: nn.Module,
    pairs: PairSource | Iterable[Mapping],
    ks: Sequence[int] = (1, 5, 10),
    *,
    processor: Any = None,
    index_model: nn.Module | None = None,
    **reading: Any,
) -> dict[str, float]:
    """
    Computes `recall_at_k` of a `CLIPModel`, and adds `mean_recall`: the mean over all cut-offs and both directions.
    Rows that repeat an image, each with one of its captions, count as one image with several captions.

    Args:
        model: A `CLIPModel`.
        pairs: Batches of a `PairCollator`, as for `embed_pairs`; or what `load_pairs` reads, such as a path or a
            `datasets.Dataset`.
        ks: Cut-offs.
        processor: The model's processor, for pairs that are no batches.
        index_model: A model, mostly the teacher, whose embeddings are searched in place of the model's own: how well
            do the student's queries find what was stored long ago?
        reading: Further arguments of `evaluation_pairs`: `split`, `image_column`, `caption_column`, `batch_size`,
            `num_workers`.

    Raises:
        TypeError: If pairs are given without a processor, or batches with arguments of how to read pairs.
        ValueError: If there are no pairs, some cannot be read, or the index model has an embedding of another width.
    """
    if holds_pairs(pairs):
        if processor is None:
            raise TypeError("Pairs that are no batches need processor=, the model's tokenizer and image processor.")
        pairs = evaluation_pairs(pairs, processor, **reading)
    elif reading:
        raise TypeError(f"{sorted(reading)} say how to read pairs; batches are read already.")
    with evaluating(model), nullcontext() if index_model is None else evaluating(index_model):
        index = None if index_model is None else Towers.of_model(index_model)
        return evaluate_towers(Towers.of_model(model), pairs, ks, index)


def evaluate_towers(
    towers: Towers, batches: Iterable[Mapping], ks: Sequence[int] = (1, 5, 10), index: Towers | None = None
) -> dict[str, float]:
    """Computes the result of `evaluate_retrieval` for towers that any runtime may run."""
    (own, *others), image_of_text = _embed([towers] if index is None else [towers, index], batches)
    return retrieval_metrics(*own, image_of_text, ks=ks, index=others[0] if others else None)


def retrieval_metrics(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of_text: torch.Tensor, **options: Any
) -> dict[str, float]:
    """
    Computes `recall_at_k`, and adds `mean_recall`: the mean over all cut-offs and both directions.

    Args:
        image_embeds: As in `recall_at_k`; such as those that `embed_pairs` returns.
        text_embeds: Likewise.
        image_of_text: Likewise.
        options: Further arguments of `recall_at_k`.
    """
    recall = recall_at_k(image_embeds, text_embeds, image_of_text, **options)
    return {**recall, "mean_recall": sum(recall.values()) / len(recall)}


def recall_columns(results: Sequence[Mapping[str, float]], ks: Sequence[int] = (1, 5, 10)) -> list[list[str]]:
    """Formats recall in percent as table columns, header first: one column per cut-off, with both directions."""
    directions = ("image_to_text", "text_to_image")

    def cell(result: Mapping[str, float], k: int) -> str:
        return " / ".join(f"{100 * result[f'{direction}_recall@{k}']:.1f}" for direction in directions)

    return [[f"R@{k} i→t / t→i", *(cell(result, k) for result in results)] for k in ks]


@torch.no_grad()
def _embed(
    models: Sequence[Towers], batches: Iterable[Mapping]
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Embeds batches by several models, each read once: images and texts of each model, and the image of each text."""
    embeds = [([], []) for _ in models]
    image_of_text, keys, device = [], [], models[0].device
    images = bad_rows = 0
    for batch in batches:
        bad_rows += sum(batch.get("bad_rows", {}).values())
        if bad_rows:
            continue  # embeds no more, but counts all bad rows for the error message
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        for towers, (image_embeds, text_embeds) in zip(models, embeds, strict=True):
            passes = towers.passes(inputs)
            image_embeds.append(passes["vision"]())
            text_embeds.append(passes["text"]())
        image_of_text.append(batch["image_of_text"].to(device) + images)
        keys.append(batch["image_key"].to(device) if "image_key" in batch else None)
        images += len(batch["pixel_values"])
    counts = gather(torch.tensor([[images, bad_rows]], device=device))  # (processes, 2)
    if counts[:, 1].any():
        raise ValueError(f"{counts[:, 1].sum()} evaluation pairs cannot be read; the log says why. Repair the data.")
    if not images:
        raise ValueError("There are no evaluation pairs.")
    owners = gather(torch.cat(image_of_text) + counts[: process_index(), 0].sum()).cpu()
    found = [tuple(gather(torch.cat(part)).cpu() for part in both) for both in embeds]
    if any(key is None for key in keys):
        return found, owners
    first, same = _first_of_equal(gather(torch.cat(keys)).cpu())
    return [(image_embeds[first], text_embeds) for image_embeds, text_embeds in found], same[owners]


def _first_of_equal(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds repeated images, as in a flat table with a row for each caption.

    Args:
        keys: Equal for equal images `(images,)`.

    Returns:
        The index of the first of equal images `(different,)`, in order, and for each image its place among those
        `(images,)`.
    """
    _, inverse = torch.unique(keys, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(keys))
    first = first.scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
    order = first.argsort()
    return first[order], order.argsort()[inverse]
