"""open_clip's own model code, with or without torchvision; and what it says of tiny models, kept in `data`.

`python tests/open_clip_golden.py` makes both folders anew where open_clip is installed (3.3.0 was).
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from transformers import AutoModel  # noqa: F401 open_clip does the same, and looks for torchvision then
from transformers.utils import is_torchvision_available


FOLDER = Path(__file__).parent / "data" / "open_clip"
RESNET_FOLDER = Path(__file__).parent / "data" / "open_clip_resnet"
# A tiny model, with what OpenAI's have: QuickGELU, and another width of heads than open_clip's default.
CONFIG = {
    "model_cfg": {
        "embed_dim": 12,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 8, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
# A tiny ResNet, whose stages differ in depth, and whose last one leaves more than one place to the attention pool.
RESNET_CONFIG = {
    **CONFIG,
    "model_cfg": {
        **CONFIG["model_cfg"],
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 4, "head_width": 32, "patch_size": None},
    },
}


def import_open_clip() -> ModuleType:
    """
    open_clip, of which only models and tokenizers are used: torchvision, which these do not need but which it imports,
    is replaced while it does so, if it is not there.

    Raises:
        ImportError: If open_clip is not installed.
    """
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    stubs = {} if is_torchvision_available() else {f"torchvision{name}": MagicMock() for name in names}
    sys.modules.update(stubs)
    try:
        return importlib.import_module("open_clip")
    finally:
        for name in stubs:
            del sys.modules[name]


def copied(source: Path, folder: Path, tokenizer: Any) -> Path:
    """A copy of what open_clip wrote, with a tokenizer."""
    shutil.copytree(source, folder)
    tokenizer.save_pretrained(folder)
    return folder


def pictures(size: int) -> torch.Tensor:
    """Random pixels; coarse ones if there are many, of which convolutions would see nothing but the mean."""
    if size <= 16:
        return torch.randn(3, 3, size, size)
    return 10 * torch.randn(3, 3, 4, 4).repeat_interleave(size // 4, dim=2).repeat_interleave(size // 4, dim=3)


def write(folder: Path, config: dict[str, Any], open_clip: ModuleType) -> None:
    """Writes a random model of a config, and what it says of random inputs."""
    torch.manual_seed(0)
    model, size = open_clip.CLIP(**config["model_cfg"]).eval(), config["model_cfg"]["vision_cfg"]["image_size"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():  # of BatchNorms, where there are any
            if name.endswith("running_mean"):
                buffer += 0.2 * torch.randn(buffer.shape)
            elif name.endswith("running_var"):
                buffer *= 0.5 + torch.rand(buffer.shape)
            elif name.endswith("num_batches_tracked"):
                buffer += 7
        pixels, ids = pictures(size), torch.randint(1, 39, (3, 8))
        ids[:, 5], ids[:, 6:] = 39, 0  # the end, then open_clip's padding
        results = {
            "pixel_values": pixels,
            "input_ids": ids,
            "image_embeds": model.encode_image(pixels, normalize=True),
            "text_embeds": model.encode_text(ids, normalize=True),
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    save_file(results, folder / "expected.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    open_clip = import_open_clip()
    for folder, config in ((FOLDER, CONFIG), (RESNET_FOLDER, RESNET_CONFIG)):
        write(folder, config, open_clip)


if __name__ == "__main__":
    main()
