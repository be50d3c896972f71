"""How far a student agrees with its teacher, on images and texts of which none belongs to another."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from clipmap_hf.data.collate import tokenized
from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.distributed import gather
from clipmap_hf.models.features import encode_images, encode_texts, evaluating


__all__ = ["AGREEMENT_METRICS", "agreement", "embed_unpaired", "evaluate_agreement"]

AGREEMENT_METRICS = MappingProxyType(  # what they are called in a card
    {
        "decisions": "same decision as the teacher among the texts",
        "image_neighbors": "same nearest other image as the teacher's",
        "text_neighbors": "same nearest other text as the teacher's",
        "mean_agreement": "mean of these three",
        "image_cosine": "mean cosine to the teacher's embeddings of the images",
        "text_cosine": "mean cosine to the teacher's embeddings of the texts",
    }
)
_CHUNK = 1024  # queries to compare at a time
Embeds = tuple[torch.Tensor, torch.Tensor]


def agreement(student: Embeds, teacher: Embeds) -> dict[str, float]:
    """
    Compares the embeddings of two models, of the same images and the same texts.

    Args:
        student: Normalized embeddings of the images `(images, dim)` and of the texts `(texts, dim)`.
        teacher: The same of the other model, perhaps of another width.

    Returns:
        Numbers between 0 and 1, but for the cosines: `image_neighbors` and `text_neighbors`, the share of images
        (texts) whose nearest other image (text) is the same for both; `decisions`, the share of images for which both
        choose the same text; `mean_agreement`, the mean of these three; and, where embeddings are equally wide,
        `image_cosine` and `text_cosine`, the mean cosine between the two models' embeddings.

    Raises:
        ValueError: If there are fewer than two images or texts, or the models have different numbers of them.
    """
    sizes = [[len(embeds) for embeds in model] for model in (student, teacher)]
    if sizes[0] != sizes[1] or min(sizes[0]) < 2:
        raise ValueError(
            f"The student has {sizes[0]} images and texts, the teacher {sizes[1]}; give both the same, of each at "
            "least two."
        )
    shares = {
        "image_neighbors": _share(_neighbors(student[0]), _neighbors(teacher[0])),
        "text_neighbors": _share(_neighbors(student[1]), _neighbors(teacher[1])),
        "decisions": _share(_nearest(*student), _nearest(*teacher)),
    }
    found = shares | {"mean_agreement": sum(shares.values()) / len(shares)}
    if student[0].shape == teacher[0].shape:
        for name, both in zip(("image_cosine", "text_cosine"), zip(student, teacher, strict=True), strict=True):
            found[name] = F.cosine_similarity(*both).mean().item()
    return found


def _share(chosen: torch.Tensor, wanted: torch.Tensor) -> float:
    return (chosen == wanted).float().mean().item()


def _nearest(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The index of the nearest key of each query, `(queries,)`."""
    return torch.cat([(chunk @ keys.T).argmax(dim=1) for chunk in queries.split(_CHUNK)])


def _neighbors(embeds: torch.Tensor) -> torch.Tensor:
    """The index of the nearest other embedding of each, `(embeds,)`."""
    found = []
    for start in range(0, len(embeds), _CHUNK):
        scores = embeds[start : start + _CHUNK] @ embeds.T  # (chunk, embeds)
        rows = torch.arange(len(scores), device=scores.device)
        scores[rows, start + rows] = -torch.inf
        found.append(scores.argmax(dim=1))
    return torch.cat(found)


def evaluate_agreement(
    student: nn.Module,
    teacher: nn.Module,
    images: PairSource,
    texts: Sequence[str],
    *,
    processor: Any,
    image_column: str = "image",
    split: str = "train",
    batch_size: int = 256,
) -> dict[str, float]:
    """
    Computes `agreement` of two CLIP models. Nothing has to be paired: the images need no captions. Several processes
    share the images.

    Args:
        student: A `CLIPModel`. Both models run in eval mode, each on its own device.
        teacher: The model that it should agree with.
        images: What `load_pairs` reads.
        texts: Queries, class names in prompts, or any texts.
        processor: Tokenizer and image processor of both.
        image_column: Column of the images.
        split: Split of the data set.
        batch_size: Images, or texts, at a time.

    Raises:
        ValueError: If there are too few images or texts, or an image cannot be read: an evaluation leaves none out.
    """
    reading = {"split": split, "image_column": image_column, "caption_column": None, "batch_size": batch_size}
    batches = evaluation_pairs(images, processor, **reading)
    return agreement(*embed_unpaired((student, teacher), batches, texts, processor.tokenizer, batch_size))


@torch.no_grad()
def embed_unpaired(
    models: Sequence[nn.Module],
    images: Iterable[Mapping[str, Any]],
    texts: Sequence[str],
    tokenizer: Any,
    batch_size: int = 256,
) -> list[Embeds]:
    """
    Embeds images and texts by several models, each batch read once. The models run in eval mode. Every process passes
    its own images, but all texts, and receives the embeddings of all images.

    Args:
        models: `CLIPModel`s.
        images: Batches of a `PairCollator` that reads no captions.
        texts: Any texts.
        tokenizer: That of all models.
        batch_size: Texts at a time.

    Returns:
        For each model, normalized embeddings of images `(images, dim)` and texts `(texts, dim)`, on the CPU.

    Raises:
        ValueError: If an image cannot be read, or there are no images or no texts.
    """
    tokens = [tokenized(tokenizer, texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    found, bad_rows = [([], []) for _ in models], 0
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        for batch in images:
            bad_rows += sum(batch["bad_rows"].values())
            if bad_rows:
                continue  # embeds no more, but counts all bad rows for the error message
            pixels = batch["pixel_values"]
            for model, (image_embeds, _) in zip(models, found, strict=True):
                image_embeds.append(encode_images(model, pixels.to(_device(model))))
        for model, (_, text_embeds) in zip(models, found, strict=True):
            text_embeds += [encode_texts(model, *(ids.to(_device(model)) for ids in both.values())) for both in tokens]
    if count := gather(torch.tensor([bad_rows], device=_device(models[0]))).sum():  # of all processes, or some wait
        raise ValueError(f"{count} images cannot be read; the log says why. Repair the data.")
    if not all(embeds for both in found for embeds in both):
        raise ValueError("There are no images or no texts to compare on; give at least two of each.")
    return [(gather(torch.cat(images)).cpu(), torch.cat(texts).cpu()) for images, texts in found]


def _device(model: nn.Module) -> torch.device:
    return model.logit_scale.device
