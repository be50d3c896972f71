"""open_clip's own model code, with or without torchvision; and what it says of a tiny model, kept in `data/open_clip`.

`python tests/open_clip_golden.py` makes that folder anew where open_clip is installed (3.3.0 was).
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from transformers import AutoModel  # noqa: F401 open_clip does the same, and looks for torchvision then
from transformers.utils import is_torchvision_available


FOLDER = Path(__file__).parent / "data" / "open_clip"
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


def main() -> None:
    open_clip = import_open_clip()
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG["model_cfg"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
        pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(1, 39, (3, 8))
        ids[:, 5], ids[:, 6:] = 39, 0  # the end, then open_clip's padding
        results = {
            "pixel_values": pixels,
            "input_ids": ids,
            "image_embeds": model.encode_image(pixels, normalize=True),
            "text_embeds": model.encode_text(ids, normalize=True),
        }
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), FOLDER / "open_clip_model.safetensors")
    save_file(results, FOLDER / "expected.safetensors")
    (FOLDER / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
