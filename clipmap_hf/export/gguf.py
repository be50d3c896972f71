"""Writes packed models as GGUF files, in the ternary types of llama.cpp; needs the package `gguf`."""

from pathlib import Path

import torch
from torch import nn

from clipmap_hf.files.atomic import atomic_files
from clipmap_hf.files.extras import require
from clipmap_hf.ternary.layers import TernaryModule


__all__ = ["GGUF_TYPES", "write_gguf"]

GGUF_TYPES = ("TQ1_0", "TQ2_0")
_BLOCK = 256  # weights that share a level in these types


def write_gguf(model: nn.Module, path: str | Path, gguf_type: str = "TQ1_0") -> dict[str, str]:
    """
    Writes a packed model to a GGUF file: all tensors under their names in transformers, and the config as JSON
    (`clip.config`).

    Ternary weights get the type `gguf_type` if its blocks of 256 weights divide the weights that share a level, which
    are a row or a block of a row. Otherwise they get fp16, which is exact too. All other tensors get fp32, the type in
    which they were trained.

    Args:
        model: A packed model, from `pack_model` or from a packed folder.
        path: The file to write.
        gguf_type: `TQ1_0` (1.69 bits a weight) or `TQ2_0` (2.06 bits).

    Returns:
        The type of each tensor, by its name.

    Raises:
        ValueError: If the type is unknown, or the model has no ternary weights.
        ImportError: If the package `gguf` is missing.
        OSError: If the file cannot be written. An existing file is then unchanged.
    """
    require("gguf", "gguf")
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
    group_size = tensor.shape[1] // module.weight_scale.shape[1]  # weights that share a level
    return gguf_type if tensor.ndim == 2 and group_size % _BLOCK == 0 else "F16"
