"""ONNX files: what ONNX Runtime and Transformers.js make of them is what the model makes."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import clip_of_kind
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from clipmap_hf.export.onnx import GRAPHS, onnx_parity, write_onnx
from clipmap_hf.hub.folder import write_student_folder


NODE_PROJECT = Path(__file__).parent / "transformers_js"
TOKENS = ("input_ids", "attention_mask")
needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnxruntime", "onnxscript"))), reason="needs the packages of the extra `onnx`"
)


@pytest.fixture(scope="module")
def folder(tiny_config, tiny_processor, tmp_path_factory) -> Path:
    """A model in half precision, of the old kind that most public checkpoints and so their students are; exported."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    clip_of_kind(tiny_config(), "old end token").half().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    config = (folder / "config.json").read_bytes()
    write_onnx(folder, CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), tiny_processor)
    assert (folder / "config.json").read_bytes() == config  # of a folder that has a model, nothing is changed
    return folder


@pytest.fixture
def model(folder) -> CLIPModel:
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def run(folder):
    """A function that runs a file on ONNX Runtime and returns its outputs by name."""
    from onnxruntime import InferenceSession

    def outputs(name: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        session = InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        return {
            output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), found, strict=True)
        }

    return outputs


@pytest.mark.slow
@needs_onnx
def test_every_file_gives_the_models_embeddings_in_batches_of_any_size(folder, model, tiny_pairs, tiny_processor):
    captions = ["red", "a", "blue bar", "an orange pie that is cut off", "black circle", "purple"]
    images = [row["image"] for row in tiny_pairs[:6]]
    batches = [
        tiny_processor(text=captions[rows], images=images[rows], padding=True, truncation=True, return_tensors="pt")
        for rows in (slice(0, 5), slice(5, 6), slice(1, 2))
    ]
    assert len({(*batch["input_ids"].shape,) for batch in batches}) == 3
    assert {path.stem for path in (folder / "onnx").iterdir()} == {*GRAPHS, *(f"{name}_quantized" for name in GRAPHS)}
    embeds = {
        "model": {"image_embeds", "text_embeds"},
        "vision_model": {"image_embeds"},
        "text_model": {"text_embeds"},
    }
    for name in GRAPHS:
        exact = onnx_parity(folder / "onnx" / f"{name}.onnx", model, batches)
        rounded = onnx_parity(folder / "onnx" / f"{name}_quantized.onnx", model, batches)
        assert exact.keys() == rounded.keys() == embeds[name]
        assert all(difference < 2e-6 and cosine > 1 - 1e-6 for difference, cosine in exact.values()), exact
        assert all(difference > 1e-5 and cosine > 0.99 for difference, cosine in rounded.values()), rounded


@pytest.mark.slow
@needs_onnx
def test_both_towers_at_once_score_any_number_of_images_and_texts(model, run, tiny_batch):
    batch = tiny_batch | {"pixel_values": tiny_batch["pixel_values"][:1]}
    found = run("model", **batch)
    assert found.keys() == {"logits_per_image", "logits_per_text", "text_embeds", "image_embeds"}
    with torch.no_grad():
        expected = model(**batch)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


@pytest.mark.slow
@needs_onnx
def test_a_tower_gives_what_its_class_in_transformers_gives(folder, run, tiny_batch):
    vision = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    text = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    pixels, tokens = tiny_batch["pixel_values"], {name: tiny_batch[name] for name in TOKENS}
    with torch.no_grad():
        expected = vision(pixel_values=pixels).image_embeds, text(**tokens).text_embeds
    found = run("vision_model", pixel_values=pixels)["image_embeds"], run("text_model", **tokens)["text_embeds"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.slow
@needs_onnx
def test_files_hold_weights_and_nothing_of_the_machine(folder, model):
    sizes = {}
    for path in (folder / "onnx").iterdir():
        content = path.read_bytes()
        sizes[path.stem] = len(content)
        assert b".py" not in content and str(Path.home()).encode() not in content
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert weights < sizes["model"] < 1.3 * weights  # these weights are tiny beside the graph
    assert all(sizes[f"{name}_quantized"] < 0.6 * sizes[name] for name in GRAPHS)


@pytest.mark.slow
@needs_onnx
def test_the_processor_of_an_exported_folder_is_the_same(folder, tiny_processor, tiny_pairs):
    row = tiny_pairs[0]
    loaded, expected = (
        processor(text=[row["caption"]], images=[row["image"]], return_tensors="pt")
        for processor in (AutoProcessor.from_pretrained(folder, backend="pil"), tiny_processor)
    )
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, atol=0, rtol=0)


def transformers_js_is_missing() -> str | None:
    """Why Transformers.js cannot be run here."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (NODE_PROJECT / "node_modules" / "@huggingface" / "transformers").is_dir():
        return "Transformers.js is not installed: npm install --ignore-scripts --prefix tests/transformers_js"
    return None


@pytest.mark.slow
@needs_onnx
@pytest.mark.skipif(transformers_js_is_missing() is not None, reason=str(transformers_js_is_missing()))
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("q8", 5e-2)])
def test_transformers_js_gives_the_same_embeddings(
    folder, model, tiny_pairs, tiny_processor, tmp_path, dtype, tolerance
):
    # Resizing is Sharp's there, Pillow's here: these need none.
    images = [row["image"].resize((32, 32)) for row in tiny_pairs[:5]]
    paths = [str(tmp_path / f"{index}.png") for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    texts = ["red circle", "It's  a BLUE bar", "pie, 3/4"]
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"images": paths, "texts": texts}))
    command = ["node", str(NODE_PROJECT / "embed.mjs"), str(folder), dtype, str(request)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    found = {name: torch.tensor(value) for name, value in json.loads(result.stdout).items()}

    batch = tiny_processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch)
    assert found["input_ids"].tolist() == batch["input_ids"].tolist()
    torch.testing.assert_close(found["pixel_values"], batch["pixel_values"], atol=1e-5, rtol=0)
    for name in ("image_embeds", "text_embeds"):
        embeds = F.normalize(found[name], dim=-1)
        torch.testing.assert_close(embeds, expected[name], atol=tolerance, rtol=0)
    scale = model.logit_scale.exp().item()
    torch.testing.assert_close(found["logits_per_image"], expected.logits_per_image, atol=scale * tolerance, rtol=0)


def test_a_student_written_anew_removes_onnx_files_of_other_weights(tiny_teacher, tiny_processor, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    write_student_folder(tmp_path, tiny_teacher, tiny_processor)
    assert not (tmp_path / "onnx").exists() and CLIPModel.from_pretrained(tmp_path)


@pytest.mark.recipes
@needs_onnx
def test_the_recipe_writes_a_folder_and_prints_how_equal_it_is(teacher_folder, tmp_path):
    recipe = Path(__file__).parents[1] / "recipes" / "export_onnx.py"
    command = [sys.executable, str(recipe), "--model", str(teacher_folder), "--output_dir", str(tmp_path / "exported")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-5000:]
    found = re.findall(r"^\| (\S+)\.onnx +\| +[\d.]+ \| +(\S+) \| +(\S+) \| +(\S+) \|$", result.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == [
        f"{name}{suffix}" for suffix in ("", "_quantized") for name in ("model", "model", "vision_model", "text_model")
    ]
    assert max(float(difference) for name, _, difference, _ in found if "quantized" not in name) < 2e-6
    assert min(float(cosine) for *_, cosine in found) > 0.99
    assert CLIPProcessor.from_pretrained(tmp_path / "exported") and not (tmp_path / "exported" / "README.md").exists()
    assert not (teacher_folder / "onnx").exists()
