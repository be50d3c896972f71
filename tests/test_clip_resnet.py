"""CLIP with OpenAI's modified ResNet: what open_clip itself says of a tiny one, and how transformers finds it."""

import shutil
import subprocess
import sys

import pytest
import torch
from open_clip_golden import FOLDER, RESNET_CONFIG, RESNET_FOLDER, copied
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPProcessor, pipeline

from clipmap_hf.export.open_clip import clip_config
from clipmap_hf.export.open_clip_folder import read_open_clip_folder, write_open_clip_folder
from clipmap_hf.files.atomic import read_json
from clipmap_hf.models.clip_resnet.config import CLIPResNetConfig
from clipmap_hf.models.clip_resnet.model import CLIPResNetModel
from clipmap_hf.models.features import encode_images, encode_texts
from clipmap_hf.models.loading import load_config, load_model, load_processor


@pytest.fixture
def golden(tmp_path, tiny_processor):
    """What open_clip itself wrote, and a tokenizer."""
    return copied(RESNET_FOLDER, tmp_path / "golden", tiny_processor.tokenizer)


@pytest.fixture
def folder(golden, tmp_path):
    """The same, converted."""
    model, processor = read_open_clip_folder(str(golden))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "converted")
    return tmp_path / "converted"


def check_embeddings(model) -> None:
    expected = load_file(RESNET_FOLDER / "expected.safetensors")
    ids = expected["input_ids"]
    with torch.no_grad():
        images = encode_images(model, expected["pixel_values"])
        texts = encode_texts(model, ids, torch.ones_like(ids))
        output = model(input_ids=ids, pixel_values=expected["pixel_values"], attention_mask=torch.ones_like(ids))
    for found, name in ((images, "image_embeds"), (texts, "text_embeds")):
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=0)
    logits = model.logit_scale.exp() * expected["image_embeds"] @ expected["text_embeds"].T
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(output.logits_per_text, logits.T, atol=1e-3, rtol=0)


def test_a_resnet_of_open_clip_has_the_same_embeddings_here(golden):
    check_embeddings(read_open_clip_folder(str(golden))[0])


def test_a_resnet_of_open_clip_comes_back_bit_by_bit(golden, tmp_path):
    model, processor = read_open_clip_folder(str(golden))
    write_open_clip_folder(tmp_path / "back", model, processor)
    found, expected = (load_file(one / "open_clip_model.safetensors") for one in (tmp_path / "back", golden))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    content = read_json(tmp_path / "back" / "open_clip_config.json")
    assert content["preprocess_cfg"] == RESNET_CONFIG["preprocess_cfg"]
    assert (content["model_cfg"]["embed_dim"], content["model_cfg"]["quick_gelu"]) == (12, True)
    vision = {key: value for key, value in RESNET_CONFIG["model_cfg"]["vision_cfg"].items() if value is not None}
    assert content["model_cfg"]["vision_cfg"] == vision
    assert content["model_cfg"]["text_cfg"].items() >= RESNET_CONFIG["model_cfg"]["text_cfg"].items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_resnet_comes_back_bit_by_bit_through_its_own_folder(golden, tmp_path, dtype):
    tensors = load_file(golden / "open_clip_model.safetensors")
    tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}
    save_file(tensors, golden / "open_clip_model.safetensors")
    model, processor = read_open_clip_folder(str(golden))
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    model, processor = load_model(str(tmp_path / "ours"), dtype=dtype), load_processor(str(tmp_path / "ours"))
    write_open_clip_folder(tmp_path / "back", model, processor)
    torch.testing.assert_close(load_file(tmp_path / "back" / "open_clip_model.safetensors"), tensors, atol=0, rtol=0)


def test_our_loaders_know_a_converted_resnet(folder, tiny_processor):
    model, processor = load_model(str(folder)), load_processor(str(folder))
    assert type(model) is CLIPResNetModel and type(processor) is CLIPProcessor and not model.training
    assert processor.tokenizer.get_vocab() == tiny_processor.tokenizer.get_vocab()
    assert dict(processor.image_processor.size) == {"shortest_edge": 64}
    check_embeddings(model)


def test_batch_counts_that_a_file_leaves_out_are_zero(golden):
    tensors = load_file(golden / "open_clip_model.safetensors")
    save_file(
        {name: one for name, one in tensors.items() if not name.endswith("num_batches_tracked")},
        golden / "open_clip_model.safetensors",
    )
    model, _ = read_open_clip_folder(str(golden))
    assert model.vision_model.bn1.num_batches_tracked == 0
    check_embeddings(model)


@pytest.mark.parametrize(
    "first",
    [
        "import clipmap_hf; from transformers import AutoConfig, AutoModel, AutoProcessor",
        "from transformers import AutoConfig, AutoModel, AutoProcessor; import clipmap_hf",
        "import clipmap_hf; from transformers import CLIPModel, AutoConfig, AutoModel, AutoProcessor",
        "import clipmap_hf.models.clip_resnet.model; from transformers import AutoConfig, AutoModel, AutoProcessor",
    ],
)
@pytest.mark.slow
def test_transformers_knows_it_after_the_package_is_imported(folder, first):
    code = (
        f"{first}\nfor one in AutoConfig, AutoModel, AutoProcessor: print(type(one.from_pretrained({str(folder)!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [line.rpartition(".")[2] for line in result.stdout.splitlines()]
    assert names == ["CLIPResNetConfig'>", "CLIPResNetModel'>", "CLIPProcessor'>"]


def test_the_automatic_classes_load_it(folder):
    assert type(AutoConfig.from_pretrained(folder)) is CLIPResNetConfig
    assert type(AutoProcessor.from_pretrained(folder, backend="pil")) is CLIPProcessor
    check_embeddings(AutoModel.from_pretrained(folder).eval())


def test_the_pipeline_classifies_with_it(clip_resnet_folder, tiny_pairs):
    processor = load_processor(str(clip_resnet_folder))
    classify = pipeline(
        "zero-shot-image-classification",
        model=str(clip_resnet_folder),
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
    )
    found = classify(tiny_pairs[0]["image"], candidate_labels=["a", "b"], hypothesis_template="{}")
    assert {one["label"] for one in found} == {"a", "b"}
    assert sum(one["score"] for one in found) == pytest.approx(1, abs=1e-5)


def test_stages_return_what_they_write(folder):
    model = load_model(str(folder))
    pixels = torch.randn(2, 3, 64, 64)
    found = model.get_image_features(pixels, output_hidden_states=True)
    shapes = [tuple(one.shape) for one in found.hidden_states]
    assert shapes == [(2, 4, 16, 16), (2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4), (2, 128, 2, 2)]
    assert model.get_image_features(pixels).hidden_states is None
    assert tuple(found.last_hidden_state.shape) == (2, 128, 2, 2)


def test_the_loss_of_pairs_is_clips(folder):
    model = load_model(str(folder))
    expected = load_file(RESNET_FOLDER / "expected.safetensors")
    loss = model(expected["input_ids"], expected["pixel_values"], return_loss=True).loss
    logits = model.logit_scale.exp() * expected["image_embeds"] @ expected["text_embeds"].T
    both = [torch.nn.functional.cross_entropy(one, torch.arange(3)) for one in (logits, logits.T)]
    torch.testing.assert_close(loss, sum(both) / 2, atol=1e-3, rtol=0)


def test_images_of_another_size_are_an_error(folder):
    with pytest.raises(ValueError, match="Images of 32 × 32 pixels do not fit this model.*64 × 64"):
        load_model(str(folder)).get_image_features(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": [3, 4, 6]}, r"layers=\[3, 4, 6\] must be 4 numbers"),
        ({"layers": [3, 0, 6, 3]}, r"layers=\[3, 0, 6, 3\] must be 4 numbers of at least 1"),
        ({"width": 45}, "width=45 must be even"),
        ({"head_width": 48}, "head_width=48 does not divide the 2048 channels"),
        ({"image_size": 100}, "image_size=100 must be a multiple of 32"),
    ],
    ids=str,
)
def test_a_tower_that_cannot_be_is_an_error(values, message):
    with pytest.raises(Exception, match=message):
        CLIPResNetConfig(vision_config=values)


def test_a_text_tower_of_another_kind_is_an_error():
    with pytest.raises(Exception, match="text_config is of the type 'bert'"):
        CLIPResNetConfig(text_config={"model_type": "bert"})


@pytest.mark.parametrize(
    ("size", "layers", "width", "dim", "text", "parameters", "vision_parameters"),
    # Counted by open_clip 3.3.0 on its own models of these sizes: OpenAI's five, then TinyCLIP's two.
    [
        (224, [3, 4, 6, 3], 64, 1024, (512, 12), 102_007_137, 38_316_896),
        (224, [3, 4, 23, 3], 64, 512, (512, 12), 119_688_033, 56_259_936),
        (288, [4, 6, 10, 6], 80, 640, (640, 12), 178_300_601, 87_137_080),
        (384, [6, 8, 18, 8], 96, 768, (768, 12), 290_979_217, 167_328_912),
        (448, [3, 15, 36, 10], 128, 1024, (1024, 12), 623_258_305, 420_380_352),
        (224, [3, 4, 6, 3], 56, 1024, (512, 9), 83_816_869, 29_583_780),
        (224, [3, 4, 6, 3], 44, 1024, (512, 6), 63_372_703, 18_596_766),
    ],
    ids=["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "RN-30M", "RN-19M"],
)
def test_sizes_are_those_of_published_models(size, layers, width, dim, text, parameters, vision_parameters):
    words = {"context_length": 77, "vocab_size": 49408, "width": text[0], "heads": text[0] // 64, "layers": text[1]}
    vision = {"image_size": size, "layers": layers, "width": width, "patch_size": None}
    config = clip_config({"model_cfg": {"embed_dim": dim, "vision_cfg": vision, "text_cfg": words}})
    with torch.device("meta"):
        model = CLIPResNetModel(config)
    counts = [sum(one.numel() for one in part.parameters()) for part in (model, model.vision_model)]
    assert counts == [parameters, vision_parameters]


def test_a_new_model_starts_as_openais():
    torch.manual_seed(0)
    vision, text = {"width": 8, "head_width": 32, "image_size": 64}, {"num_hidden_layers": 1}
    model = CLIPResNetModel(CLIPResNetConfig(vision_config=vision, text_config=text, projection_dim=16))
    pool = model.vision_model.attnpool
    for tensor in (pool.positional_embedding, pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight):
        assert float(tensor.std()) == pytest.approx(256**-0.5, rel=0.05)
    assert not model.vision_model.layer3[2].bn3.weight.any() and model.vision_model.layer3[2].bn2.weight.all()
    assert float(model.vision_model.layer4[1].conv2.weight.abs().max()) <= (64 * 9) ** -0.5  # torch's own bound


@pytest.mark.parametrize("of", ["vit", "resnet"])
def test_a_folder_in_open_clips_format_is_an_error_that_says_how_to_convert_it(of, golden):
    if of == "vit":
        shutil.copyfile(FOLDER / "open_clip_config.json", golden / "open_clip_config.json")
    for load in (load_config, load_model, load_processor):
        with pytest.raises(OSError, match="is in open_clip's format.*clipmap-hf convert_open_clip --model .* --to"):
            load(str(golden))
