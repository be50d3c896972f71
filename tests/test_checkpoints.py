"""
Checkpoints as they are published: of the Hub if asked for, and in the forms that old and large ones have.

Every test runs on small folders in each form; `make test-hub` runs the same on what OpenAI, LAION and Google publish.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from clipmap_hf import Budget, ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.config import student_config
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.collate import tokenized
from clipmap_hf.export.onnx import onnx_parity, write_onnx
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.models.features import encode_images, encode_texts
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.shapes import choose_shape


PUBLISHED = {  # Hub id -> its parameters, as the publishers count them
    "openai/clip-vit-base-patch32": 151_277_313,
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": 149_620_737,
    "google/siglip-base-patch16-224": 203_155_970,
}
ON_THE_HUB = [pytest.param(id, marks=pytest.mark.hub) for id in PUBLISHED]


# Forms of a folder


def legacy(folder: Path) -> None:
    """As OpenAI's: sizes in `*_config_dict`, the end token 2, position ids among the weights, an old processor."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    for tower in ("text_config", "vision_config"):
        config[f"{tower}_dict"] = config[tower]
        config[tower] = {name: value for name, value in config[tower].items() if name.endswith("token_id")}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": None, "torch_dtype": "float32"}))
    tensors = load_file(folder / SAFE_WEIGHTS_NAME)
    for tower in ("text_model", "vision_model"):
        positions = len(tensors[f"{tower}.embeddings.position_embedding.weight"])
        tensors[f"{tower}.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    images = {
        name: value
        for name, value in AutoImageProcessor.from_pretrained(folder, backend="pil").to_dict().items()
        if name.startswith(("do_", "image_m", "image_std", "resample"))
    }
    images |= {"crop_size": 32, "size": 32, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def slow_tokenizer(folder: Path) -> None:
    """`vocab.json` and `merges.txt`, without `tokenizer.json`."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def cast(folder: Path) -> None:
        AutoModel.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        assert {tensor.dtype for tensor in load_file(folder / SAFE_WEIGHTS_NAME).values()} == {dtype}

    return cast


def sharded(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="300KB")
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / SAFE_WEIGHTS_INDEX_NAME).is_file()


FORMS = {
    "plain": (),
    "legacy": (legacy,),
    "slow tokenizer": (slow_tokenizer,),
    "legacy, slow tokenizer": (legacy, slow_tokenizer),
    "bf16": (in_dtype(torch.bfloat16),),
    "fp16": (in_dtype(torch.float16),),
    "sharded": (sharded,),
    "sharded bf16": (in_dtype(torch.bfloat16), sharded),
    "siglip": (),
}


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint as plain transformers loads it.

    Args:
        id: Hub id or folder.
        parameters: How many it has.
        model: The model in fp32.
        inputs: Its inputs for `IMAGES` and `CAPTIONS`.
    """

    id: str
    parameters: int
    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]


COLORS = ("red", "green", "blue", "black", "orange", "purple", "white", "gray")
CAPTIONS = [f"a {color} picture" for color in COLORS]
IMAGES = [Image.effect_mandelbrot((260, 230), (-2, -1.5 + i / 8, 1, 1.5), 40).convert("RGB") for i in range(8)]
PAIRS = list(zip(IMAGES, CAPTIONS, strict=True))


@pytest.fixture(
    scope="module",
    params=[*FORMS, *ON_THE_HUB],
)
def checkpoint(request, teacher_folder, siglip_folder, tmp_path_factory) -> Checkpoint:
    if request.param in PUBLISHED:
        skip_without_network(request.param)
        return as_transformers_loads(request.param, PUBLISHED[request.param])
    folder = tmp_path_factory.mktemp("checkpoint") / "teacher"
    shutil.copytree(siglip_folder if request.param == "siglip" else teacher_folder, folder)
    count = AutoModel.from_pretrained(folder).num_parameters()
    for change in FORMS[request.param]:
        change(folder)
    return as_transformers_loads(str(folder), count)


def skip_without_network(id: str) -> None:
    try:
        hf_hub_download(id, "config.json")
    except (HTTPError, LocalEntryNotFoundError) as error:
        pytest.skip(f"no network: {error}")


def as_transformers_loads(id: str, parameters: int) -> Checkpoint:
    model = AutoModel.from_pretrained(id, dtype=torch.float32, use_safetensors=True).eval()
    options = {"padding": True}
    if model.config.model_type == "siglip":  # as its model card says
        options = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
    tokenizer = AutoTokenizer.from_pretrained(id)
    names = ["input_ids"] if model.config.model_type == "siglip" else ["input_ids", "attention_mask"]
    inputs = dict(tokenizer(CAPTIONS, return_tensors="pt", truncation=True, **options))
    inputs = {name: inputs[name] for name in names}
    images = AutoImageProcessor.from_pretrained(id, backend="pil")(IMAGES, return_tensors="pt")
    return Checkpoint(id, parameters, model, inputs | {"pixel_values": images["pixel_values"]})


def half(config: PretrainedConfig, initializer: str) -> ClipMapConfig:
    """Half of the heads, and with them of the width, and half of the layers."""

    def tower(config: PretrainedConfig) -> TowerConfig:
        heads = config.num_attention_heads // 2
        width = heads * config.hidden_size // config.num_attention_heads
        return TowerConfig(hidden_size=width, num_hidden_layers=config.num_hidden_layers // 2)

    vision, text = tower(config.vision_config), tower(config.text_config)
    return ClipMapConfig(vision=vision, text=text, initializer=initializer)


def embeddings(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return output.image_embeds, output.text_embeds


def test_a_checkpoint_is_loaded_with_all_of_its_parameters_in_fp32(checkpoint):
    model = load_model(checkpoint.id)
    assert sum(p.numel() for p in model.parameters()) == checkpoint.parameters
    assert model_cost(model.config).parameters == checkpoint.parameters
    torch.testing.assert_close(model.state_dict(), checkpoint.model.state_dict(), atol=0, rtol=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_checkpoint_is_given_the_pixels_and_tokens_of_transformers(checkpoint):
    processor = load_processor(checkpoint.id)
    pixels = processor.image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, checkpoint.inputs["pixel_values"], atol=0, rtol=0)
    ids = tokenized(processor.tokenizer, CAPTIONS)["input_ids"]
    torch.testing.assert_close(ids, checkpoint.inputs["input_ids"], atol=0, rtol=0)


def test_the_embeddings_of_a_checkpoint_are_those_of_transformers(checkpoint):
    model, tokens = load_model(checkpoint.id), tokenized(load_processor(checkpoint.id).tokenizer, CAPTIONS)
    with torch.no_grad():
        images = encode_images(model, checkpoint.inputs["pixel_values"])
        texts = encode_texts(model, tokens["input_ids"], tokens["attention_mask"])
    expected = embeddings(checkpoint.model, checkpoint.inputs)
    torch.testing.assert_close((images, texts), expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def compressors(checkpoint) -> dict[str, ClipMapCompressor]:
    """Without training, from no pairs and from some; of a SigLIP, whose layers are not gone through, these select."""
    from_pairs = "taylor" if checkpoint.model.config.model_type == "siglip" else "calibrated"
    return {
        initializer: ClipMapCompressor.from_pretrained(
            checkpoint.id, half(checkpoint.model.config, initializer), calibration_data=data
        )
        for initializer, data in (("diagonal", None), (from_pairs, PAIRS))
    }


@pytest.mark.parametrize("index", [0, 1], ids=["from no pairs", "from pairs"])
def test_a_student_of_a_checkpoint_is_what_plain_transformers_loads(checkpoint, compressors, index, tmp_path):
    compressor = list(compressors.values())[index]
    compressor.save_pretrained(tmp_path, include_map=False)
    student, exported = AutoModel.from_pretrained(tmp_path).eval(), compressor.export()
    torch.testing.assert_close(student.state_dict(), exported.state_dict(), atol=0, rtol=0)
    expected = embeddings(exported.eval(), checkpoint.inputs)
    torch.testing.assert_close(embeddings(student, checkpoint.inputs), expected, atol=0, rtol=0)
    count = sum(p.numel() for p in student.parameters())
    assert compressor.cost()["student"].parameters == count < checkpoint.parameters / 2
    ids = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]
    assert ids.max() < student.config.text_config.vocab_size


def test_a_calibrated_student_of_a_checkpoint_is_nearer_to_it(checkpoint, compressors):
    if "calibrated" not in compressors:
        pytest.skip("the layers of a SigLIP are not gone through")
    teacher = torch.stack(embeddings(checkpoint.model, checkpoint.inputs))
    likeness = {}
    for name, compressor in compressors.items():
        student = torch.stack(embeddings(compressor.export().eval(), checkpoint.inputs))
        likeness[name] = F.cosine_similarity(student, teacher, dim=-1).mean(dim=1)  # of images, of texts
    assert (likeness["calibrated"] > likeness["diagonal"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["plain", *ON_THE_HUB], indirect=True)
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs ONNX Runtime")
def test_a_student_of_a_checkpoint_is_exported_to_onnx(checkpoint, compressors, tmp_path):
    compressor = compressors["diagonal"]
    student = compressor.export().eval()
    write_onnx(tmp_path, student, compressor.processor)
    parity = onnx_parity(tmp_path / "onnx" / "model.onnx", student, [checkpoint.inputs])
    assert all(difference < 1e-4 for difference, _ in parity.values()) and len(parity) == 2


# Large shapes, without their weights

LARGE = {  # name -> width, layers, heads, image and patch of images; width, layers, heads of texts; joint; parameters
    "openai/clip-vit-large-patch14-336": ((1024, 24, 16, 336, 14), (768, 12, 12), 768, 427_944_193),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ((1280, 32, 16, 224, 14), (1024, 24, 16), 1024, 986_109_441),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ((1664, 48, 16, 224, 14), (1280, 32, 20), 1280, 2_539_567_105),
}


@pytest.fixture(params=LARGE)
def large(request) -> tuple[CLIPModel, int]:
    """A model of a published shape on the meta device, and how many parameters it is said to have."""
    (width, layers, heads, image, patch), (text_width, text_layers, text_heads), joint, count = LARGE[request.param]
    vision = {"hidden_size": width, "intermediate_size": 8192 if width == 1664 else 4 * width, "image_size": image}
    vision |= {"num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers}
    text |= {"num_attention_heads": text_heads}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=joint))
    return model, count


def test_a_large_model_has_the_parameters_that_are_published(large):
    model, count = large
    assert model_cost(model.config).parameters == model.num_parameters() == count


def test_a_large_model_has_students_of_half_its_size(large):
    model, count = large
    config = half(model.config, "diagonal")
    plan = MappingPlan.make(model, config)
    assert set(plan.cut) == {"vision", "text"}
    vision, student = model.config.vision_config, plan.student.vision_config
    assert student.hidden_size // student.num_attention_heads == vision.hidden_size // vision.num_attention_heads
    with torch.device("meta"):
        assert CLIPModel(plan.student).num_parameters() < count / 2


def test_a_large_model_has_the_student_that_its_budget_asks_for(large):
    model, _ = large
    choice = choose_shape(model.config, ClipMapConfig(TowerConfig(), TowerConfig(), budget=Budget(params=10**8)))
    assert 0.9e8 < model_cost(student_config(model.config, choice.config)).parameters <= 1e8
