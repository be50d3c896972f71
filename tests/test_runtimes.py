"""Exports are stood in for by graphs of two or three nodes, made here."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import parser
from torch.nn import functional as F

from clipmap_hf.costs.memory import peak_memory
from clipmap_hf.costs.runtimes import RUNTIMES


VISION = """
<ir_version: 10, opset_import: ["" : 18]>
vision (float[batch, 3, height, width] pixel_values) => (float[batch, 2] image_embeds)
<int64[2] space = {2, 3}, float[3, 2] weight = {1, 2, 3, 4, 5, 6}>
{
    means = ReduceMean<keepdims = 0>(pixel_values, space)
    image_embeds = MatMul(means, weight)
}
"""
TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
text (int64[batch, length] input_ids, int64[batch, length] attention_mask) => (float[batch, 2] text_embeds)
<int64[1] last = {1}, float[1, 2] weight = {1, -1}, float[2] bias = {0, 10}>
{
    open = Mul(input_ids, attention_mask)
    numbers = Cast<to = 1>(open)
    means = ReduceMean(numbers, last)
    products = MatMul(means, weight)
    text_embeds = Add(products, bias)
}
"""
WITHOUT_MASK = TEXT.replace(", int64[batch, length] attention_mask", "").replace(
    "Mul(input_ids, attention_mask)", "Identity(input_ids)"
)


@pytest.fixture
def export(teacher_folder, tmp_path) -> Path:
    """A folder with a config, `onnx/`, and texts that do without a mask in int8."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    for suffix, text in (("", TEXT), ("_int8", WITHOUT_MASK)):
        onnx.save(parser.parse_model(VISION), tmp_path / "onnx" / f"vision_model{suffix}.onnx")
        onnx.save(parser.parse_model(text), tmp_path / "onnx" / f"text_model{suffix}.onnx")
    return tmp_path


def test_transformers_gives_the_models_embeddings(teacher_folder, tiny_teacher, tiny_batch):
    towers = RUNTIMES["transformers"].load(teacher_folder, "cpu")
    with torch.no_grad():
        expected = tiny_teacher(**tiny_batch)
        embeds = {name: run() for name, run in towers.passes(tiny_batch).items()}
    torch.testing.assert_close(embeds["vision"], expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds["text"], expected.text_embeds, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("runtime", "masked"), [("onnx", True), ("onnx_int8", False)])
def test_an_export_gives_normalized_embeddings(export, runtime, masked):
    towers = RUNTIMES[runtime].load(export, "cpu")
    pixels, ids = torch.rand(4, 3, 8, 8), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    means = (ids * mask if masked else ids).float().mean(dim=1, keepdim=True)
    images = F.normalize(pixels.mean(dim=(2, 3)) @ torch.arange(1.0, 7).view(3, 2), dim=-1)
    texts = F.normalize(torch.cat([means, 10 - means], dim=1), dim=-1)
    torch.testing.assert_close(towers.images(pixels), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(towers.texts(ids, mask), texts, atol=1e-6, rtol=0)


def test_a_runtime_finds_its_own_files(export, teacher_folder):
    names = {runtime: [path.name for path in one.files(export)] for runtime, one in RUNTIMES.items()}
    assert names["onnx"] == ["vision_model.onnx", "text_model.onnx"]
    assert names["onnx_int8"] == ["vision_model_int8.onnx", "text_model_int8.onnx"]
    assert not names["transformers"] and not names["onnx_quantized"]
    (export / "onnx" / "vision_model.onnx.data").touch()
    (export / "onnx" / "text_model_int8.onnx").unlink()
    assert len(RUNTIMES["onnx"].files(export)) == 3 and not RUNTIMES["onnx_int8"].files(export)
    assert [path.name for path in RUNTIMES["transformers"].files(teacher_folder)] == ["model.safetensors"]


def test_an_export_is_not_moved_to_a_gpu(export):
    with pytest.raises(ValueError, match="on the CPU, got device='cuda'"):
        RUNTIMES["onnx"].load(export, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["transformers", "onnx"])
def test_memory_is_that_of_a_process_of_its_own(export, teacher_folder, runtime):
    ballast = torch.ones(250_000_000)  # 1 GB that the other process must not be charged with
    peak = peak_memory(teacher_folder if runtime == "transformers" else export, runtime, batch_size=2)
    assert 5e7 < peak.libraries < peak.bytes < 1e9 and ballast.numel()
