"""The runtimes of a model folder: transformers, and ONNX Runtime for an export that lies beside the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from clipmap_hf.files.extras import require
from clipmap_hf.models.features import Towers
from clipmap_hf.models.loading import load_model


__all__ = ["RUNTIMES", "Runtime"]


@dataclass(frozen=True)
class Runtime:
    """
    A way to run a model folder.

    Args:
        load: Function that loads the towers from a folder onto a device.
        patterns: Glob patterns of the files that hold the weights, relative to the folder.
    """

    load: Callable[[Path, str], Towers]
    patterns: tuple[str, ...]

    def files(self, folder: Path) -> list[Path]:
        """Returns the files that hold the weights. The list is empty if this runtime cannot run the folder."""
        found = [sorted(folder.glob(pattern)) for pattern in self.patterns]
        return sum(found, []) if all(found) else []


def _load_transformers(folder: Path, device: str) -> Towers:
    return Towers.of_model(load_model(str(folder)).to(device))


def _load_onnx(folder: Path, device: str, suffix: str) -> Towers:
    """Loads the towers of an export. Raises a `ValueError` on any device but the CPU."""
    require("onnx", "onnxruntime")
    import onnxruntime  # optional, from the extra `onnx`

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
        lambda pixel_values: _embed(vision, "image_embeds", pixel_values=pixel_values),
        lambda input_ids, mask: _embed(text, "text_embeds", input_ids=input_ids, attention_mask=mask),
        torch.device("cpu"),
    )


def _embed(session, output: str, **inputs: torch.Tensor) -> torch.Tensor:
    """Runs a session and normalizes its output. Inputs that it does not know, such as a mask, are left out."""
    known = {node.name for node in session.get_inputs()}
    (embeds,) = session.run([output], {name: tensor.numpy() for name, tensor in inputs.items() if name in known})
    return F.normalize(torch.from_numpy(embeds), dim=-1)


def _onnx_runtime(suffix: str) -> Runtime:
    """
    Makes the runtime of an export. Its files have the names that Transformers.js looks for. Large weights lie in
    additional files, whose names continue that of the graph's file.
    """
    patterns = tuple(f"onnx/{tower}_model{suffix}.onnx*" for tower in ("vision", "text"))
    return Runtime(partial(_load_onnx, suffix=suffix), patterns)


RUNTIMES = {
    "transformers": Runtime(_load_transformers, ("model*.safetensors",)),
    "onnx": _onnx_runtime(""),
    "onnx_int8": _onnx_runtime("_int8"),
    "onnx_quantized": _onnx_runtime("_quantized"),
}
