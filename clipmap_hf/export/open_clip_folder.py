"""Folders of open_clip models, as on the Hub: config, safetensors weights and a tokenizer."""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, PreTrainedModel

from clipmap_hf.export.open_clip import (
    clip_config,
    clip_image_processor,
    clip_tensors,
    open_clip_config,
    open_clip_tensors,
)
from clipmap_hf.files.atomic import atomic_files, read_json, write_json
from clipmap_hf.models.loading import check_float


__all__ = ["read_open_clip_folder", "write_open_clip_folder"]

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip_folder(
    folder: str | Path, model: PreTrainedModel, processor: CLIPProcessor, repo_id: str | None = None
) -> None:
    """
    Writes what `open_clip.create_model_and_transforms("local-dir:…")` and `open_clip.get_tokenizer("local-dir:…")`
    load, or with `hf-hub:` once it is pushed.

    Args:
        folder: Made if needed.
        model: A `CLIPModel`.
        processor: Its tokenizer and image processor.
        repo_id: The Hub id it will have, where open_clip then looks for the tokenizer; by default the folder's name,
            which does for the folder.

    Raises:
        ValueError: If open_clip cannot express the model, or its weights are packed.
    """
    check_float(model, "open_clip")
    folder = Path(folder)
    config = open_clip_config(model.config, processor.image_processor, repo_id or folder.resolve().name)
    tensors = open_clip_tensors(model.state_dict(), model.config)
    with atomic_files(folder) as temporary:
        write_json(temporary / CONFIG, config)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        processor.tokenizer.save_pretrained(temporary)


def read_open_clip_folder(
    source: str, tokenizer: str | None = None, *, revision: str | None = None
) -> tuple[CLIPModel, CLIPProcessor]:
    """
    A model and its processor from an open_clip folder or Hub repository; safetensors only.

    Args:
        source: Folder or Hub id.
        tokenizer: Folder or Hub id of the tokenizer, if `source` has none: open_clip's default one is that of
            `openai/clip-vit-base-patch16`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        OSError: If a file is missing or the Hub cannot be reached.
        ValueError: If it is no model that `CLIPModel` can be, or weights do not fit its config.
    """
    if not os.path.isdir(source):
        patterns = [CONFIG, WEIGHTS, "*token*.json", "vocab.json", "merges.txt"]
        source = snapshot_download(source, revision=revision, allow_patterns=patterns)
    folder = Path(source)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise OSError(f"{source!r} has no {name}; it is no open_clip model with safetensors weights.")
    values = read_json(folder / CONFIG)
    config = clip_config(values)
    tensors = clip_tensors(load_file(folder / WEIGHTS), config)
    with torch.device("meta"):  # a config says nothing of memory until its tensors are seen to be there
        expected = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if tensor.shape != expected[name]]
    if wrong:
        raise ValueError(f"In {source!r}, {len(wrong)} tensors have not the shape that {CONFIG} says: {wrong[:5]}.")
    model = CLIPModel(config).to(tensors["logit_scale"].dtype)
    model.load_state_dict(tensors, strict=True)
    if tokenizer is None and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise OSError(f"{source!r} holds no tokenizer; name one. That of openai/clip-vit-base-patch16 is the default.")
    words = AutoTokenizer.from_pretrained(tokenizer or source, trust_remote_code=False)
    words.model_max_length = min(words.model_max_length, config.text_config.max_position_embeddings)
    return model.eval(), CLIPProcessor(image_processor=clip_image_processor(values), tokenizer=words)
