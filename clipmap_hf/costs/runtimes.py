"""What runs a model folder: transformers, or ONNX Runtime on an export beside the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import Towers
from clipmap_hf.models.loading import load_model


__all__ = ["RUNTIMES", "Runtime"]


@dataclass(frozen=True)
class Runtime:
    """
    A way to run a model folder.

    Args:
        load: From the folder and a device to its towers.
        patterns: Of the files that hold its weights, relative to the folder.
    """

    load: Callable[[Path, str], Towers]
    patterns: tuple[str, ...]

    def files(self, folder: Path) -> list[Path]:
        """The files that hold the weights; empty where the folder cannot be run so."""
        found = [sorted(folder.glob(pattern)) for pattern in self.patterns]
        return sum(found, []) if all(found) else []


def _transformers(folder: Path, device: str) -> Towers:
    return Towers.of_model(load_model(str(folder)).to(device))


def _onnx(folder: Path, device: str, suffix: str) -> Towers:
    """Raises `ValueError` on another device than the CPU."""
    import onnxruntime  # not a dependency: the extra `onnx`

    if device != "cpu":
        raise ValueError(f"Exports run on the CPU, got device={device!r}; compare them with device='cpu'.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    vision, text = (
        onnxruntime.InferenceSession(
            folder / "onnx" / f"{tower}_model{suffix}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for tower in ("vision", "text")
    )
    return Towers(
        lambda pixel_values: _embeds(vision, "image_embeds", pixel_values=pixel_values),
        lambda input_ids, mask: _embeds(text, "text_embeds", input_ids=input_ids, attention_mask=mask),
        torch.device("cpu"),
    )


def _embeds(session, output: str, **inputs: torch.Tensor) -> torch.Tensor:
    """Normalized; of the inputs, a session gets those that it knows (a text tower may do without its mask)."""
    known = {one.name for one in session.get_inputs()}
    (embeds,) = session.run([output], {name: tensor.numpy() for name, tensor in inputs.items() if name in known})
    return F.normalize(torch.from_numpy(embeds), dim=-1)


def _exports(suffix: str) -> Runtime:
    """Both towers under the names that Transformers.js looks for; large weights lie in files beside the graph."""
    patterns = tuple(f"onnx/{tower}_model{suffix}.onnx*" for tower in ("vision", "text"))
    return Runtime(partial(_onnx, suffix=suffix), patterns)


RUNTIMES = {
    "transformers": Runtime(_transformers, ("model*.safetensors",)),
    "onnx": _exports(""),
    "onnx_int8": _exports("_int8"),
    "onnx_quantized": _exports("_quantized"),
}
