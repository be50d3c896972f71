"""A student for a fixed list of texts, as its folder holds it: a vision tower, the list, and its text embeddings."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.utils import cached_file

from clipmap_hf.models.finite import check_finite
from clipmap_hf.models.loading import load_config
from clipmap_hf.models.vision_tower import VISION_TOWERS


__all__ = ["LABELS_FILE", "TEXT_EMBEDS_FILE", "LabelModel", "LabelTokenizer", "is_label_folder", "load_label_model"]

LABELS_FILE = "labels.json"
TEXT_EMBEDS_FILE = "text_embeds.safetensors"


class LabelTokenizer:
    """
    Takes texts of a fixed list to their places in it, in place of a tokenizer.

    Args:
        labels: The list.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, labels: Sequence[str]):
        self.labels = list(labels)
        self._places = {label: place for place, label in enumerate(self.labels)}

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, torch.Tensor]:
        """
        Looks up texts.

        Args:
            texts: Texts of the list.
            options: What tokenizers take; not used.

        Returns:
            The place of each text, and a mask of ones, both `(texts, 1)`.

        Raises:
            ValueError: If a text is not in the list.
        """
        missing = sorted({text for text in texts if text.strip() not in self._places})
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(texts)} texts are not among the {len(self.labels)} labels of this model, "
                f"which knows no others: {missing[:5]}."
            )
        places = torch.tensor([[self._places[text.strip()]] for text in texts])
        return {"input_ids": places, "attention_mask": torch.ones_like(places)}


class LabelModel(nn.Module):
    """
    A vision tower, and the text embeddings of a fixed list, with the methods of a `CLIPModel` that evaluations call.
    Texts are what a `LabelTokenizer` makes of them.

    Args:
        vision: A vision tower with projection, or a whole `CLIPModel`, of which only images are asked.
        text_embeds: Normalized text embeddings of the list `(texts, dim)`.
        logit_scale: Reciprocal temperature of the similarities.
    """

    def __init__(self, vision: PreTrainedModel, text_embeds: torch.Tensor, logit_scale: torch.Tensor):
        super().__init__()
        self.vision = vision
        self.register_buffer("text_embeds", text_embeds)
        self.register_buffer("logit_scale", logit_scale.log())

    def get_image_features(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """Embeds images, as a `CLIPModel` does."""
        if hasattr(self.vision, "get_image_features"):
            return self.vision.get_image_features(pixel_values=pixel_values)
        return SimpleNamespace(pooler_output=self.vision(pixel_values=pixel_values).image_embeds)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Looks up the embeddings of texts of the list by their places `(texts, 1)`."""
        return SimpleNamespace(pooler_output=self.text_embeds[input_ids[:, 0]])


def is_label_folder(source: str, *, revision: str | None = None, **kwargs: Any) -> bool:
    """
    Whether a folder or Hub id holds a vision tower alone, rather than a whole model.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        kwargs: Passed to the download.
    """
    return load_config(source, revision=revision, **kwargs).model_type in VISION_TOWERS


def load_label_model(
    source: str, *, revision: str | None = None, backend: str = "pil", **kwargs: Any
) -> tuple[LabelModel, SimpleNamespace]:
    """
    Loads a student for a fixed list of texts, in eval mode.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        backend: Of the image processor, `pil` or `torchvision`.
        kwargs: Passed to every download (`token`, `cache_dir`, `local_files_only`, …).

    Returns:
        The model, and in place of a processor its `image_processor` and a `LabelTokenizer` as its `tokenizer`.

    Raises:
        OSError: If a file is missing or the Hub cannot be reached.
        ValueError: If a tensor is missing, not finite, or does not fit the others.
    """
    options = {"revision": revision, **kwargs}
    tower, info = VISION_TOWERS[load_config(source, **options).model_type].from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    labels = json.loads(Path(cached_file(source, LABELS_FILE, **options)).read_text(encoding="utf-8"))
    stored = load_file(cached_file(source, TEXT_EMBEDS_FILE, **options))
    embeds = stored["text_embeds"].float()
    if info["missing_keys"] or embeds.shape != (len(labels), tower.config.projection_dim):
        raise ValueError(
            f"The files in {source!r} do not belong together: {len(labels)} labels, text embeddings "
            f"{tuple(embeds.shape)}, a vision tower of {tower.config.projection_dim} dimensions without "
            f"{sorted(info['missing_keys'])}."
        )
    check_finite(tower.state_dict() | stored, f"The student in {source!r}")
    processor = AutoImageProcessor.from_pretrained(source, backend=backend, **options)
    model = LabelModel(tower, F.normalize(embeds, dim=-1), stored["logit_scale"].float()).eval()
    return model, SimpleNamespace(tokenizer=LabelTokenizer(labels), image_processor=processor)
