"""Image–text retrieval: recall@k in both directions, for images with one or several captions."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from clipmap_hf.distributed import gather, process_index
from clipmap_hf.models.features import Towers, evaluating


__all__ = ["embed_pairs", "evaluate_retrieval", "evaluate_towers", "recall_at_k", "recall_columns"]


def recall_at_k(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_text: torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
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

    Returns:
        `{"image_to_text_recall@1": …, "text_to_image_recall@1": …, …}`, between 0 and 1.

    Raises:
        ValueError: If `image_of_text` does not fit the embeddings, or an image has no text.
    """
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
        "image_to_text": _ranks(image_embeds, text_embeds, image_ids, image_of_text, chunk_size),
        "text_to_image": _ranks(text_embeds, image_embeds, image_of_text, image_ids, chunk_size),
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
        return _embed(Towers.of_model(model), batches)


def evaluate_retrieval(
    model: nn.Module, batches: Iterable[Mapping], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """
    Computes `recall_at_k` of a `CLIPModel` on collated pairs, and adds `mean_recall`: the mean over all cut-offs and
    both directions. Arguments as in `embed_pairs` and `recall_at_k`.
    """
    with evaluating(model):
        return evaluate_towers(Towers.of_model(model), batches, ks)


def evaluate_towers(towers: Towers, batches: Iterable[Mapping], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Computes the result of `evaluate_retrieval` for towers that any runtime may run."""
    recall = recall_at_k(*_embed(towers, batches), ks=ks)
    return {**recall, "mean_recall": sum(recall.values()) / len(recall)}


def recall_columns(results: Sequence[Mapping[str, float]], ks: Sequence[int] = (1, 5, 10)) -> list[list[str]]:
    """Formats recall in percent as table columns, header first: one column per cut-off, with both directions."""
    directions = ("image_to_text", "text_to_image")

    def cell(result: Mapping[str, float], k: int) -> str:
        return " / ".join(f"{100 * result[f'{direction}_recall@{k}']:.1f}" for direction in directions)

    return [[f"R@{k} i→t / t→i", *(cell(result, k) for result in results)] for k in ks]


@torch.no_grad()
def _embed(towers: Towers, batches: Iterable[Mapping]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image_embeds, text_embeds, image_of_text = [], [], []
    images = bad_rows = 0
    for batch in batches:
        bad_rows += sum(batch.get("bad_rows", {}).values())
        if bad_rows:
            continue  # embeds no more, but counts all bad rows for the error message
        passes = towers.passes({name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
        image_embeds.append(passes["vision"]())
        text_embeds.append(passes["text"]())
        image_of_text.append(batch["image_of_text"].to(towers.device) + images)
        images += len(batch["pixel_values"])
    counts = gather(torch.tensor([[images, bad_rows]], device=towers.device))  # (processes, 2)
    if counts[:, 1].any():
        raise ValueError(f"{counts[:, 1].sum()} evaluation pairs cannot be read; the log says why. Repair the data.")
    if not images:
        raise ValueError("There are no evaluation pairs.")
    embeds = [torch.cat(image_embeds), torch.cat(text_embeds), torch.cat(image_of_text)]
    embeds[2] += counts[: process_index(), 0].sum()
    return tuple(gather(rows).cpu() for rows in embeds)
