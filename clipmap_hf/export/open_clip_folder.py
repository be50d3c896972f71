"""Writes and reads folders of open_clip models, as on the Hub: config, safetensors weights and a tokenizer."""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, PreTrainedModel

from clipmap_hf.export.open_clip import clip_config, clip_image_processor, open_clip_config
from clipmap_hf.export.open_clip_tensors import clip_tensors, open_clip_tensors
from clipmap_hf.files.atomic import atomic_files, read_json, write_json
from clipmap_hf.models.clip_resnet.config import MODEL_TYPE
from clipmap_hf.models.clip_resnet.model import CLIPResNetModel
from clipmap_hf.models.finite import check_finite
from clipmap_hf.models.loading import check_float


__all__ = ["read_open_clip_folder", "write_open_clip_folder"]

_CLASSES = {"clip": CLIPModel, MODEL_TYPE: CLIPResNetModel}
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip_folder(
    folder: str | Path, model: PreTrainedModel, processor: CLIPProcessor, repo_id: str | None = None
) -> None:
    """
    Writes a folder that `open_clip.create_model_and_transforms("local-dir:…")` and
    `open_clip.get_tokenizer("local-dir:…")` load. Once it is pushed to the Hub, they load it with `hf-hub:…`.

    Args:
        folder: The folder to write. It is created if needed.
        model: A `CLIPModel` or `CLIPResNetModel`.
        processor: The model's tokenizer and image processor.
        repo_id: The Hub id to which the folder will be pushed, where open_clip will look for the tokenizer. The
            default, the name of the folder, is enough for local use.

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
) -> tuple[PreTrainedModel, CLIPProcessor]:
    """
    Loads a model and its processor from an open_clip folder or Hub repository. Only safetensors weights are read.
    OpenAI's ResNets become a `CLIPResNetModel`, ViTs a `CLIPModel`.

    Args:
        source: Folder or Hub id, which may begin with open_clip's `hf-hub:`.
        tokenizer: Folder or Hub id of the tokenizer, if `source` has none. open_clip's default tokenizer is that of
            `openai/clip-vit-base-patch16`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        OSError: If a file is missing or the Hub cannot be reached.
        ValueError: If neither class can express the model, or the weights do not fit the config or are not finite.
    """
    source = source.removeprefix("hf-hub:")
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
    make = _CLASSES[config.model_type]
    with torch.device("meta"):  # allocates no memory before the tensors are known to fit the config
        expected = {name: tensor.shape for name, tensor in make(config).state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if tensor.shape != expected[name]]
    if wrong:
        raise ValueError(
            f"In {source!r}, {len(wrong)} tensors do not have the shape that {CONFIG} gives: {wrong[:5]}."
        )
    check_finite(tensors, f"The model in {source!r}")
    model = make(config).to(tensors["logit_scale"].dtype)
    model.load_state_dict(tensors, strict=True)
    if tokenizer is None and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise OSError(
            f"{source!r} holds no tokenizer; give `tokenizer=`, such as 'openai/clip-vit-base-patch16', which has "
            "open_clip's default tokenizer."
        )
    words = AutoTokenizer.from_pretrained(tokenizer or source, trust_remote_code=False)
    words.model_max_length = min(words.model_max_length, config.text_config.max_position_embeddings)
    return model.eval(), CLIPProcessor(image_processor=clip_image_processor(values), tokenizer=words)
