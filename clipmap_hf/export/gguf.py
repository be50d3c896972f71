"""Packed models as GGUF files, in the ternary types of llama.cpp; needs the package `gguf`."""

from pathlib import Path

import torch
from torch import nn

from clipmap_hf.files.atomic import atomic_files
from clipmap_hf.ternary.layers import TernaryModule


__all__ = ["GGUF_TYPES", "write_gguf"]

GGUF_TYPES = ("TQ1_0", "TQ2_0")
_BLOCK = 256  # weights that have a level of their own in these types


def write_gguf(model: nn.Module, path: str | Path, gguf_type: str = "TQ1_0") -> dict[str, str]:
    """
    Writes all tensors of a packed model under their names in transformers, and its config as JSON (`clip.config`).
    Ternary weights have the ternary type where its blocks of 256 divide what has one level, a row or a block of one;
    else fp16, which holds them as exactly. All other tensors are fp32, as they were trained.

    Args:
        model: What `pack_model` makes or a packed folder holds.
        path: The file to write.
        gguf_type: `TQ1_0` (1.69 bits a weight) or `TQ2_0` (2.06 bits).

    Returns:
        The type of each tensor.

    Raises:
        ValueError: If the type is unknown, or the model has nothing ternary.
        ImportError: If the package `gguf` is missing.
        OSError: If the file cannot be written; what was there is as it was.
    """
    import gguf

    modules = {name: module for name, module in model.named_modules() if isinstance(module, TernaryModule)}
    if gguf_type not in GGUF_TYPES:
        raise ValueError(f"gguf_type={gguf_type!r} is unknown; it must be one of {GGUF_TYPES}.")
    if not modules:
        raise ValueError(
            f"A {type(model).__name__} is not ternary, so there is nothing to write; load a packed folder."
        )
    path, types = Path(path).absolute(), {}
    with atomic_files(path.parent) as folder:
        writer = gguf.GGUFWriter(folder / path.name, "clip")
        writer.add_string("clip.config", model.config.to_json_string(use_diff=False))
        for name, tensor in _float_tensors(model, modules).items():
            kind = _gguf_type(modules.get(name.removesuffix(".weight")), tensor, gguf_type)
            types[name] = kind
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return types


def _float_tensors(model: nn.Module, modules: dict[str, TernaryModule]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if owner in modules and kind == "weight_scale":
            continue
        tensors[name] = modules[owner].float_weight() if owner in modules and kind == "weight" else tensor.float()
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _gguf_type(module: TernaryModule | None, tensor: torch.Tensor, gguf_type: str) -> str:
    if module is None or tensor.ndim == 1:
        return "F32"
    of_one_level = tensor.shape[1] // module.weight_scale.shape[1]
    return gguf_type if tensor.ndim == 2 and of_one_level % _BLOCK == 0 else "F16"
