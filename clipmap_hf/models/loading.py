"""Loading CLIP models, configs and processors, strictly: what is missing or does not fit is an error, never random."""

import copy
import json
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import safe_open
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from clipmap_hf.files.hub_ids import check_hub_id
from clipmap_hf.models.finite import check_finite
from clipmap_hf.models.options import DOWNLOAD_OPTIONS


__all__ = ["check_float", "load_config", "load_model", "load_processor"]

_TRITS = 5  # in a byte of packed ternary weights, at most
_PROCESSORS = {"chinese_clip": ChineseCLIPProcessor, "siglip": SiglipProcessor}  # others have CLIP's


def load_config(source: str, *, revision: str | None = None, **kwargs) -> PretrainedConfig:
    """
    The config of a CLIP model folder or Hub id; `kwargs` are passed to `from_pretrained`.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        kwargs: Passed to `from_pretrained`.

    Raises:
        OSError: If it is missing or the Hub cannot be reached, or the folder is in open_clip's format.
        ValueError: If its values are of the wrong kind, or it names code of its own, which is never run.
    """
    if not os.path.isdir(source):
        check_hub_id(source, "model", kwargs.get("token"))
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **kwargs)
    except StrictDataclassError as error:
        raise ValueError(f"The config.json in {source!r} is not valid. {error}") from error
    except (OSError, ValueError) as error:
        if (Path(source) / "open_clip_config.json").is_file():
            raise OSError(
                f"{source!r} is in open_clip's format. Convert it first, and give the folder that this writes: "
                f"clipmap-hf convert_open_clip --model {source} --to transformers --output_dir FOLDER"
            ) from error
        raise
    if getattr(config, "auto_map", None):
        raise ValueError(
            f"The config.json in {source!r} names code of its own (auto_map: {config.auto_map}), which is never "
            "run. If transformers has the model, a copy without `auto_map` can be loaded."
        )
    return config


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
        ValueError: If the checkpoint lacks a tensor, or holds unknown ones or some of another shape; if the config
            describes a far larger model, or names code of its own; if a weight is NaN or infinite, in the file or in
            `dtype`.
    """
    options = {name: kwargs[name] for name in DOWNLOAD_OPTIONS if name in kwargs}
    config = load_config(source, revision=revision, **options)
    _check_size(source, config, _weight_files(source, revision, options))
    model, info = AutoModel.from_pretrained(
        source,
        revision=revision,
        trust_remote_code=False,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below with the rest instead of as a traceback
        **kwargs,
    )
    problems = {
        "missing": sorted(info["missing_keys"]),
        "not part of the model": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(entry) for entry in info["mismatched_keys"]),
        "that could not be read": sorted(map(str, info["error_msgs"])),
    }
    found = "; ".join(f"{what}: {names}" for what, names in problems.items() if names)
    if found:
        raise ValueError(f"The weights in {source!r} do not fit its config.json. Tensors {found}.")
    check_finite(model.state_dict(), f"The model in {source!r}")
    return model.eval()


def check_float(model: PreTrainedModel, what: str) -> None:
    """
    Looks whether a model's weights are float, which `what`, a noun, works with.

    Raises:
        ValueError: If they are packed.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{what} works with float weights, and those of this {type(model).__name__} are packed; give it "
            "`model.dequantize()`, or the folder to which that was saved."
        )


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
    options = {"revision": revision, "trust_remote_code": False, **kwargs}
    config = load_config(source, revision=revision, **kwargs)
    # Loaded apart: the tokenizer has a `backend` of its own, and would take the image processor's for it.
    processor = _PROCESSORS.get(config.model_type, CLIPProcessor)(
        image_processor=AutoImageProcessor.from_pretrained(source, backend=backend, **options),
        tokenizer=AutoTokenizer.from_pretrained(source, **options),
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


def _weight_files(source: str, revision: str | None, options: dict[str, Any]) -> list[Path]:
    """The model's safetensors files; those on the Hub are downloaded."""

    def file(name: str) -> Path | None:
        lenient = {"_raise_exceptions_for_missing_entries": False}
        try:
            found = cached_file(source, name, revision=revision, **lenient, **options)
        except HTTPError as error:
            raise OSError(f"{name} of {source!r} could not be downloaded: {error} Try again.") from error
        return None if found is None else Path(found)

    if (whole := file(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := file(SAFE_WEIGHTS_INDEX_NAME)) is None:
        raise OSError(
            f"{source!r} has no file named {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, and pickled weights are "
            "never loaded. Hub repositories often have a conversion as a pull request (revision='refs/pr/N'); or "
            "convert the weights once."
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"The weights in {source!r} are listed to lie outside of it, in {outside}; none is read.")
    files = {name: file(name) for name in names}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        raise OSError(f"{source!r} lacks {missing}, which its {SAFE_WEIGHTS_INDEX_NAME} names.")
    return list(files.values())


def _check_size(source: str, config: PretrainedConfig, files: list[Path]) -> None:
    """
    Checks that the config describes nothing much larger than the weights: it is built before they are read, and what
    they lack would be made up in memory. Smaller differences are found, and named, after loading.
    """
    tensors = elements = 0
    for path in files:
        with safe_open(path, "pt") as opened:
            slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118, no mapping
            tensors += len(slices)
            elements += sum(prod(part.get_shape()) * (_TRITS if part.get_dtype() == "U8" else 1) for part in slices)
    for name in ("vision_config", "text_config"):
        tower = getattr(config, name, None)
        if tower is None:
            raise ValueError(f"{source!r} holds a model of type {config.model_type!r}, which has no {name}: no CLIP.")
        layers = getattr(tower, "num_hidden_layers", 0)
        least = _least_parameters(tower, getattr(config, "projection_dim", 0))
        if layers > tensors or least > 2 * elements:
            raise ValueError(
                f"The config.json in {source!r} and its weights do not belong together: {name} describes {layers:,} "
                f"layers and at least {least:,} parameters, the weights hold {tensors:,} tensors of {elements:,} "
                "values in all."
            )
    with torch.device("meta"):  # exact, now that its layers are few enough to be listed
        described = sum(weight.numel() for weight in AutoModel.from_config(copy.deepcopy(config)).parameters())
    if described > 2 * elements:
        raise ValueError(
            f"The config.json in {source!r} and its weights do not belong together: it describes {described:,} "
            f"parameters, the weights hold {elements:,} values."
        )


def _least_parameters(tower: PretrainedConfig | None, projection_dim: int) -> int:
    """The matrices that a tower of these sizes cannot be without."""

    def size(name: str) -> int:
        return getattr(tower, name, 0) or 0

    width, patch = size("hidden_size"), size("patch_size")
    rows = size("vocab_size") + size("max_position_embeddings") + max(projection_dim, size("projection_dim"))
    rows += size("num_channels") * patch**2 + (size("image_size") // patch) ** 2 if patch else 0
    ffn = size("intermediate_size")  # a ResNet has none, and no layers that are all as wide
    return (size("num_hidden_layers") * (4 * width**2 + 2 * width * ffn) if ffn else 0) + rows * width
