"""Zero-shot classification: class embeddings from prompts, accuracy@1 and @5, and mean per-class recall."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from clipmap_hf.data.collate import tokenized
from clipmap_hf.data.pairs import PairSource, holds_pairs, load_pairs
from clipmap_hf.data.prompts import DEFAULT_TEMPLATES
from clipmap_hf.distributed import gather, process_count, process_index
from clipmap_hf.evaluation.labeled import class_names, labeled_batches
from clipmap_hf.models.features import encode_images, encode_texts, evaluating


__all__ = ["DEFAULT_TEMPLATES", "evaluate_zero_shot", "zero_shot_classifier", "zero_shot_logits", "zero_shot_metrics"]


@torch.no_grad()
def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Any,
    classnames: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 256,
) -> torch.Tensor:
    """
    Computes a normalized embedding for each class from the mean of its prompts' normalized embeddings, as in CLIP
    §3.1.4.

    Args:
        model: A `CLIPModel`. It runs in eval mode on its own device.
        tokenizer: The model's tokenizer. Prompts are truncated to its `model_max_length`.
        classnames: Names of the classes, in the order of the labels.
        templates: Prompts with `{}` in place of the class name.
        batch_size: Prompts to encode at a time.

    Returns:
        Class embeddings of shape `(classes, projection_dim)`, fp32, on the CPU.

    Raises:
        ValueError: If there are no classes or templates, or a template has no `{}`.
    """
    if isinstance(classnames, str) or not len(classnames):
        raise ValueError(f"classnames={classnames!r} must be a list of at least one class name.")
    if isinstance(templates, str) or not len(templates):
        raise ValueError(f"templates={templates!r} must be a list of at least one prompt with '{{}}' for the class.")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"Template {template!r} has no '{{}}'; write '{{}}' in place of the class name.")
    prompts = [template.replace("{}", name) for name in classnames for template in templates]
    device, embeds = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokens = (tensor.to(device) for tensor in tokenized(tokenizer, batch).values())
            embeds.append(encode_texts(model, *tokens).cpu())
    mean = torch.cat(embeds).unflatten(0, (len(classnames), len(templates))).mean(dim=1)
    return F.normalize(mean, dim=-1)


def zero_shot_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """
    Computes metrics of class scores. Ties (and NaN) count against the model, so constant scores have `accuracy@1` 0.

    Args:
        logits: Scores `(images, classes)`. Only their order within a row matters.
        labels: Class index of each image `(images,)`, int64.

    Returns:
        `accuracy@1`, `accuracy@5` and `mean_per_class_recall`, each between 0 and 1. With fewer than five classes,
        `accuracy@5` counts hits among as many results as there are classes. The recall is the mean over the classes
        that occur.

    Raises:
        ValueError: If there are no images, or the labels do not fit the scores.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"Expected logits (images, classes) and labels (images,) of at least one image; "
            f"got shapes {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    classes = logits.shape[1]
    outside = labels[(labels < 0) | (labels >= classes)].unique().tolist()
    if outside:
        raise ValueError(f"Labels {outside[:10]} are outside 0 … {classes - 1}, the range of the {classes} classes.")
    right = logits.gather(1, labels[:, None])
    is_label = torch.arange(classes, device=labels.device) == labels[:, None]
    ranks = (~(logits < right) & ~is_label).sum(dim=1)  # wrong classes that score at least as high
    hits = (ranks == 0).float()
    per_class = [hits[labels == label].mean().item() for label in labels.unique()]
    return {
        "accuracy@1": hits.mean().item(),
        "accuracy@5": (ranks < min(5, classes)).float().mean().item(),
        "mean_per_class_recall": sum(per_class) / len(per_class),
    }


@torch.no_grad()
def zero_shot_logits(
    model: nn.Module, batches: Iterable[Mapping], classifier: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the cosine similarities of images and classes. Every process passes its own batches and receives the
    similarities of all processes.

    Args:
        model: A `CLIPModel`. It runs in eval mode on its own device.
        batches: Batches of `pixel_values` `(batch, 3, height, width)` and `labels` `(batch,)` or `(batch, classes)`.
        classifier: Class embeddings `(classes, projection_dim)` of `zero_shot_classifier`.

    Returns:
        The similarities `(images, classes)` and the images' labels, both on the CPU.
    """
    device = next(model.parameters()).device
    classes = classifier.to(device).T
    logits, labels = [torch.empty(0, len(classifier), device=device)], []
    with evaluating(model):
        for batch in batches:
            logits.append(encode_images(model, batch["pixel_values"].to(device)) @ classes)
            labels.append(torch.as_tensor(batch["labels"]).to(device))
    labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.long, device=device)
    return gather(torch.cat(logits)).cpu(), gather(labels).cpu()


def evaluate_zero_shot(
    model: nn.Module,
    images: PairSource | Iterable[Mapping],
    classifier: torch.Tensor | None = None,
    *,
    processor: Any = None,
    label_column: str = "label",
    classnames: Sequence[str] | None = None,
    image_column: str = "image",
    split: str = "train",
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 256,
) -> dict[str, float]:
    """
    Computes `zero_shot_metrics` of a `CLIPModel` on labeled images with one class each. Several processes share the
    images.

    Args:
        model: A `CLIPModel`. It runs in eval mode on its own device.
        images: Batches as for `zero_shot_logits`; or what `load_pairs` reads, such as a path or a `datasets.Dataset`,
            with a column of labels in place of the captions.
        classifier: Class embeddings of `zero_shot_classifier`; made of the names of the labels, if images are no
            batches.
        processor: The model's processor, for images that are no batches.
        label_column: Column of the labels: a `ClassLabel`, strings, or class numbers if there are `classnames`.
        classnames: Names of the classes in the order of their numbers, in place of those that the labels have.
        image_column: Column of the images.
        split: Split of the data set. Plain files have only `train`.
        templates: Prompts with `{}` in place of the class name.
        batch_size: Images per batch.

    Raises:
        TypeError: If images are given without a processor, or batches without a classifier.
        ValueError: If there are no images, or a label is not a class.
    """
    if not holds_pairs(images):
        if classifier is None:
            raise TypeError("Batches need a classifier, which zero_shot_classifier makes of the class names.")
        return zero_shot_metrics(*zero_shot_logits(model, images, classifier))
    if processor is None or classifier is not None:
        raise TypeError("Images that are no batches need processor=, and a classifier is made of their labels.")
    rows = load_pairs(images, split=split, image_column=image_column, caption_columns=[label_column])
    names = class_names(rows, label_column) if classnames is None else list(classnames)
    classifier = zero_shot_classifier(model, processor.tokenizer, names, templates)
    rows = rows.shard(process_count(), process_index(), contiguous=True)
    batches = labeled_batches(rows, processor.image_processor, label_column, names, batch_size)
    return zero_shot_metrics(*zero_shot_logits(model, batches, classifier))
