"""Loading CLIP models, configs and processors, strictly: what is missing or does not fit is an error, never random."""

import os

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    ChineseCLIPProcessor,
    CLIPProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipProcessor,
)


__all__ = ["load_config", "load_model", "load_processor"]

_PROCESSORS = {"chinese_clip": ChineseCLIPProcessor, "siglip": SiglipProcessor}  # others have CLIP's


def load_config(source: str, *, revision: str | None = None, **kwargs) -> PretrainedConfig:
    """
    The config of a CLIP model folder or Hub id; `kwargs` are passed to `from_pretrained`.

    Raises:
        OSError: If it is missing or the Hub cannot be reached.
    """
    _check_folder(source)
    return AutoConfig.from_pretrained(source, revision=revision, **kwargs)


def load_model(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32, **kwargs
) -> PreTrainedModel:
    """
    A CLIP model from a folder or Hub id, in eval mode; safetensors only.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        dtype: Weights are cast to it; fp32 for mapping, whatever the checkpoint holds.
        kwargs: Passed to `from_pretrained` (`token`, `cache_dir`, `local_files_only`, …).

    Raises:
        OSError: If a file is missing, there are only pickled weights, or the Hub cannot be reached.
        ValueError: If the checkpoint lacks a tensor, holds one too many, or one of another shape.
    """
    _check_folder(source)
    try:
        model, info = AutoModel.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below with the rest instead of as a traceback
            **kwargs,
        )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise OSError(
            f"{source!r} has no safetensors weights, and pickled ones are never loaded. Hub repositories often have "
            "a conversion as a pull request (revision='refs/pr/N'); or convert the weights once. "
            f"transformers said: {error}"
        ) from error
    problems = {
        "missing": sorted(info["missing_keys"]),
        "not part of the model": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(entry) for entry in info["mismatched_keys"]),
        "that could not be read": sorted(map(str, info["error_msgs"])),
    }
    found = "; ".join(f"{what}: {names}" for what, names in problems.items() if names)
    if found:
        raise ValueError(f"The weights in {source!r} do not fit its config.json. Tensors {found}.")
    return model.eval()


def load_processor(source: str, *, revision: str | None = None, backend: str = "pil", **kwargs) -> ProcessorMixin:
    """
    Tokenizer and image processor of a CLIP model: a `CLIPProcessor`, or what the family has in its place.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        backend: `pil` (the reference resizing) or `torchvision` (faster, slightly different pixels).
        kwargs: Passed to `from_pretrained`.

    Raises:
        OSError: If a file is missing or the Hub cannot be reached.
        ValueError: If `backend` cannot be had.
    """
    _check_folder(source)
    config = load_config(source, revision=revision, **kwargs)
    # One by one: the tokenizer has a `backend` of its own, and would take this one for it.
    processor = _PROCESSORS.get(config.model_type, CLIPProcessor)(
        image_processor=AutoImageProcessor.from_pretrained(source, revision=revision, backend=backend, **kwargs),
        tokenizer=AutoTokenizer.from_pretrained(source, revision=revision, **kwargs),
    )
    if config.model_type == "siglip":  # trained on texts that are padded to the full length, without a mask
        processor.tokenizer.model_input_names = ["input_ids"]
    positions = config.text_config.max_position_embeddings  # XLM-R's tokenizer, which MetaCLIP 2 has, knows others
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions)
    if processor.tokenizer.vocab_size <= len(processor.tokenizer.all_special_ids):  # made up without files
        raise OSError(f"{source!r} holds no tokenizer; add its `tokenizer.json`, or `vocab.json` and `merges.txt`.")
    if processor.image_processor.backend != backend:  # transformers falls back with a warning
        raise ValueError(
            f"backend={backend!r} is not available, only {processor.image_processor.backend!r}; "
            "install torchvision, or choose backend='pil'."
        )
    return processor


def _check_folder(source: str) -> None:
    """A path that is no folder would otherwise be taken for a Hub id."""
    if (os.path.isabs(source) or source.startswith((".", "~"))) and not os.path.isdir(source):
        raise OSError(f"There is no folder {source!r}.")
