"""Writes a model as ONNX files: both towers in one graph and each in its own, in fp32 and in dynamic int8."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.files.atomic import atomic_files
from clipmap_hf.files.extras import require
from clipmap_hf.models.features import ClipFeatures, project_images, project_texts
from clipmap_hf.models.loading import check_float


__all__ = ["GRAPHS", "ONNX_FOLDER", "onnx_parity", "write_onnx"]

ONNX_FOLDER = "onnx"  # inside a model's folder, where Transformers.js looks


def _compute_logits(model: nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    output = model(**inputs)
    return {name: output[name] for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")}


def _embed_images(model: nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"image_embeds": project_images(model, **inputs)}


def _embed_texts(model: nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"text_embeds": project_texts(model, **inputs)}


# Files, inputs and outputs have the names that Transformers.js looks for. As in transformers, the graph of a single
# tower does not normalize its embeddings.
GRAPHS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "model": _compute_logits,
    "vision_model": _embed_images,
    "text_model": _embed_texts,
}
_TOKENS = ("input_ids", "attention_mask")
_INPUTS = {"model": ("pixel_values", *_TOKENS), "vision_model": ("pixel_values",), "text_model": _TOKENS}


class _Graph(nn.Module):
    """The computation of one file, as a module that can be traced."""

    def __init__(self, model: nn.Module, compute: Callable[..., dict[str, torch.Tensor]]):
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.compute(self.model, **inputs)


def write_onnx(folder: str | Path, model: PreTrainedModel, processor: CLIPProcessor) -> None:
    """
    Writes a model's ONNX files to `onnx/` in its folder: `{model,vision_model,text_model}.onnx` in fp32, and the same
    names with `_quantized` in int8. The int8 files hold int8 weights, and quantize activations at run time. The graphs
    take any number of images, and any number of texts of any length.

    The image processor is written to `preprocessor_config.json`, where Transformers.js looks for it. If the folder
    has no model, the config and the processor are written too.

    Args:
        folder: The model's folder. It is created if needed.
        model: The model, in fp32 and on the CPU.
        processor: The model's processor.

    Raises:
        ImportError: If the packages of the extra `onnx` are not installed.
        ValueError: If the model's weights are packed.
    """
    require("onnx", "onnx", "onnxruntime", "onnxscript")
    check_float(model, "The export to ONNX")
    from transformers.exporters import OnnxExporter

    exporter = OnnxExporter()
    import onnx_ir

    folder = Path(folder)
    sample = _make_inputs(model, processor)
    with atomic_files(folder) as temporary:
        (temporary / ONNX_FOLDER).mkdir()
        for name in GRAPHS:
            inputs = {key: sample[key] for key in _INPUTS[name] if key in sample}
            program = _trace(exporter, model, name, inputs)
            onnx_ir.save(program, temporary / ONNX_FOLDER / f"{name}.onnx")
            onnx_ir.save(_quantize(program, inputs), temporary / ONNX_FOLDER / f"{name}_quantized.onnx")
        processor.image_processor.save_pretrained(temporary)
        if not (folder / "config.json").exists():
            model.config.save_pretrained(temporary)
            processor.save_pretrained(temporary)


def onnx_parity(
    path: str | Path, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """
    Measures how far the embeddings of an ONNX file are from the model's. The file is run by ONNX Runtime on the CPU.
    All embeddings are normalized before they are compared.

    Args:
        path: A file that `write_onnx` wrote.
        model: The model that was exported, in fp32 and on the CPU.
        batches: Batches of collated pairs, of any size.

    Returns:
        The largest difference of a component and the lowest cosine similarity, by the name of the output:
        `image_embeds`, `text_embeds` or both.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs() if output.name.endswith("_embeds")]
    differences, cosines = ({name: [] for name in outputs} for _ in range(2))
    for batch in batches:
        with torch.no_grad():
            output = model(**{name: batch[name] for name in _INPUTS["model"] if name in batch})
        expected = dict(zip(("image_embeds", "text_embeds"), ClipFeatures.embeds(output), strict=True))
        feed = {node.name: batch[node.name].numpy() for node in session.get_inputs()}
        for name, found in zip(outputs, session.run(outputs, feed), strict=True):
            embeds = F.normalize(torch.from_numpy(found), dim=-1)
            differences[name].append((embeds - expected[name]).abs().max().item())
            cosines[name].append((embeds * expected[name]).sum(dim=-1).min().item())
    return {name: (max(differences[name]), min(cosines[name])) for name in outputs}


def _make_inputs(model: PreTrainedModel, processor: CLIPProcessor) -> dict[str, torch.Tensor]:
    """Makes inputs to trace with: two texts and three images, since tracing takes an axis of length 1 as constant."""
    side = model.config.vision_config.image_size
    images = [Image.new("RGB", (side, side))] * 3
    return dict(processor(text=["a drawing", "a"], images=images, padding=True, return_tensors="pt"))


def _trace(exporter, model: PreTrainedModel, name: str, inputs: dict[str, torch.Tensor]):
    """Traces the graph of one file, and removes the metadata of its nodes, such as paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim
    from transformers.exporters import OnnxConfig

    texts = {0: Dim("texts"), 1: Dim("length", max=model.config.text_config.max_position_embeddings)}
    free = {"pixel_values": {0: Dim("images")}, "input_ids": texts, "attention_mask": texts}
    shapes = {key: free[key] for key in inputs}
    exported = exporter.export(_Graph(model, GRAPHS[name]), inputs, OnnxConfig(dynamic_shapes=shapes))
    return ClearMetadataAndDocStringPass()(exported.program).model


def _quantize(program, inputs: dict[str, torch.Tensor]):
    """
    Returns a graph with its matrices in int8, with one scale per column. The token embedding is quantized too, since
    it is most of a small student.
    """
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.configs import ExportFormat

    config = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True)
    return OnnxRuntimeQuantizer(config).quantize(program, inputs, ExportFormat.ONNX)
