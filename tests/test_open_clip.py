import pytest
import torch
from conftest import clip_of_kind
from open_clip_golden import CONFIG, FOLDER, RESNET_FOLDER, copied, import_open_clip
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from clipmap_hf.export import open_clip_folder
from clipmap_hf.export.open_clip import clip_config, clip_image_processor, open_clip_config
from clipmap_hf.export.open_clip_folder import read_open_clip_folder, write_open_clip_folder
from clipmap_hf.export.open_clip_tensors import clip_tensors, open_clip_tensors
from clipmap_hf.files.atomic import read_json, write_json
from clipmap_hf.models.features import encode_images, encode_texts


KINDS = ("gelu", "quick_gelu", "old end token")


@pytest.fixture
def golden(tmp_path, tiny_processor):
    """What open_clip itself wrote, and a tokenizer."""
    return copied(FOLDER, tmp_path / "golden", tiny_processor.tokenizer)


@pytest.fixture
def folder(tiny_teacher, tiny_processor, tmp_path):
    write_open_clip_folder(tmp_path / "there", tiny_teacher, tiny_processor)
    return tmp_path / "there"


def change(folder, section: str, **values) -> None:
    """Sets values of a section of the model's config, or of `preprocess_cfg`."""
    content = read_json(folder / "open_clip_config.json")
    parts = {**content["model_cfg"], **content}
    parts[section].update(values)
    write_json(folder / "open_clip_config.json", content)


def test_a_model_of_open_clip_has_the_same_embeddings_here(golden):
    model, _ = read_open_clip_folder(str(golden))
    expected = load_file(golden / "expected.safetensors")
    with torch.no_grad():
        images = encode_images(model, expected["pixel_values"])
        texts = encode_texts(model, expected["input_ids"], torch.ones_like(expected["input_ids"]))
    torch.testing.assert_close(images, expected["image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, expected["text_embeds"], atol=1e-5, rtol=0)


def test_a_model_of_open_clip_comes_back_bit_by_bit(golden, tmp_path):
    model, processor = read_open_clip_folder(str(golden))
    write_open_clip_folder(tmp_path / "back", model, processor)
    found, expected = (load_file(one / "open_clip_model.safetensors") for one in (tmp_path / "back", golden))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    content = read_json(tmp_path / "back" / "open_clip_config.json")
    assert content["preprocess_cfg"] == CONFIG["preprocess_cfg"]
    assert (content["model_cfg"]["embed_dim"], content["model_cfg"]["quick_gelu"]) == (12, True)
    for tower in ("vision_cfg", "text_cfg"):
        assert content["model_cfg"][tower].items() >= CONFIG["model_cfg"][tower].items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_bit_by_bit(tiny_config, tiny_processor, tmp_path, kind, dtype):
    model = clip_of_kind(tiny_config(), kind).to(dtype)
    write_open_clip_folder(tmp_path, model, tiny_processor)
    back, processor = read_open_clip_folder(str(tmp_path))
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), atol=0, rtol=0)
    for tower in ("vision_config", "text_config"):
        assert getattr(back.config, tower).hidden_act == getattr(model.config, tower).hidden_act
        assert getattr(back.config, tower).intermediate_size == getattr(model.config, tower).intermediate_size
    assert processor.tokenizer.get_vocab() == tiny_processor.tokenizer.get_vocab()
    assert back.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    for name in ("size", "do_center_crop", "image_mean", "image_std", "resample"):
        assert getattr(processor.image_processor, name) == getattr(tiny_processor.image_processor, name)


def test_names_are_those_of_open_clip(tiny_teacher):
    tensors = open_clip_tensors(tiny_teacher.state_dict(), tiny_teacher.config)
    fused = tensors["visual.transformer.resblocks.3.attn.in_proj_weight"].chunk(3)
    for one, part in zip("qkv", fused, strict=True):
        name = f"vision_model.encoder.layers.3.self_attn.{one}_proj.weight"
        torch.testing.assert_close(part, tiny_teacher.state_dict()[name], atol=0, rtol=0)
    torch.testing.assert_close(tensors["visual.proj"], tiny_teacher.visual_projection.weight.detach().T)
    back = clip_tensors(tensors, tiny_teacher.config)
    torch.testing.assert_close(back, dict(tiny_teacher.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("convert", [open_clip_tensors, clip_tensors])
def test_unknown_and_missing_tensors_are_errors(tiny_teacher, convert):
    tensors, config = tiny_teacher.state_dict(), tiny_teacher.config
    if convert is clip_tensors:
        tensors = open_clip_tensors(tensors, config)
    with pytest.raises(ValueError, match=r"1 are unknown, such as \['extra'\]"):
        convert({**tensors, "extra": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"1 are missing, such as \['logit_scale'\]"):
        convert({name: tensor for name, tensor in tensors.items() if name != "logit_scale"}, config)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision_cfg", {"timm_model_name": "vit"}, r"vision_cfg with \{'timm_model_name': 'vit'\}"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg of a ResNet with {'patch_size': 8}"),
        ("vision_cfg", {"layers": [3, 4], "patch_size": None}, r"(?s)not valid.*layers=\[3, 4\] must be 4 numbers"),
        ("text_cfg", {"hf_model_name": "roberta"}, "text_cfg with"),
        ("text_cfg", {"pool_type": "last"}, "pool_type='last'"),
        ("text_cfg", {"pool_type": "eos", "eos_id": 2}, "pool_type='eos' at the id 2"),
        ("model_cfg", {"custom_text": True}, "model_cfg with"),
        ("preprocess_cfg", {"resize_mode": "longest"}, "resize_mode='longest'"),
        ("preprocess_cfg", {"interpolation": "random"}, "interpolation='random'"),
        ("preprocess_cfg", {"size": 32}, "size=32"),
        ("vision_cfg", {"width": 24}, "tensors do not have the shape"),
        ("vision_cfg", {"layers": 10**9}, "1000000002 layers, but there are"),
        ("vision_cfg", {"layers": 1}, "unknown"),
        ("text_cfg", {"layers": 3}, "missing"),
    ],
    ids=str,
)
def test_what_clip_cannot_be_is_an_error(golden, section, values, message):
    change(golden, section, **values)
    with pytest.raises(ValueError, match=message):
        read_open_clip_folder(str(golden))


def test_what_is_off_is_no_error(golden):
    change(golden, "vision_cfg", timm_model_name=None, attentional_pool=False)
    read_open_clip_folder(str(golden))


def test_weights_that_are_not_finite_are_refused_by_name(tiny_teacher, tiny_processor, tmp_path):
    tiny_teacher.visual_projection.weight.data[0, 0] = torch.nan
    write_open_clip_folder(tmp_path, tiny_teacher, tiny_processor)
    with pytest.raises(ValueError, match=r"not finite.*'visual_projection\.weight'"):
        read_open_clip_folder(str(tmp_path))


def test_missing_files_are_errors(golden, tmp_path):
    (golden / "tokenizer.json").unlink()
    with pytest.raises(OSError, match="holds no tokenizer; give `tokenizer=`"):
        read_open_clip_folder(str(golden))
    (golden / "open_clip_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no open_clip_model\.safetensors"):
        read_open_clip_folder(str(golden))


def test_what_open_clip_cannot_express_is_an_error(tiny_config, tiny_processor, metaclip2, tmp_path):
    config, images = tiny_config(), tiny_processor.image_processor
    for model, processor, message in (
        (metaclip2.config, images, "type 'metaclip_2'"),
        (tiny_config(text={"hidden_act": "gelu"}), images, "hidden_act 'quick_gelu' and 'gelu'"),
        (config, CLIPImageProcessorPil(), "size="),
        (
            config,
            CLIPImageProcessorPil(resample=0),
            "resample=0",
        ),
        (config, CLIPImageProcessorPil(do_normalize=False), "leaves out a step"),
    ):
        with pytest.raises(ValueError, match=message):
            open_clip_config(model, processor, "me/x")


def test_preprocessing_and_other_details_come_back(tiny_config):
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, resample=2, image_mean=[0.5, 0.4, 0.3])
    config = tiny_config(vision={"layer_norm_eps": 1e-6}, text={"eos_token_id": 7})
    values = open_clip_config(config, images, "me/x")
    assert values["preprocess_cfg"]["resize_mode"] == "shortest"
    assert values["model_cfg"]["text_cfg"].items() >= {("pool_type", "eos"), ("eos_id", 7)}
    back, processor = clip_config(values), clip_image_processor(values)
    assert back.vision_config.layer_norm_eps == 1e-6 and back.text_config.layer_norm_eps == 1e-5
    assert back.text_config.eos_token_id == 7
    for name in ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample"):
        assert getattr(processor, name) == getattr(images, name)


@pytest.mark.parametrize(("width", "intermediate_size"), [(704, 960), (448, 488), (768, 3072), (192, 500)])
def test_ffn_widths_come_back_though_open_clip_stores_ratios(tiny_config, width, intermediate_size):
    sizes = {"hidden_size": width, "intermediate_size": intermediate_size, "num_attention_heads": width // 64}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    values = open_clip_config(tiny_config(vision=sizes), images, "me/x")
    assert clip_config(values).vision_config.intermediate_size == intermediate_size


@pytest.fixture(scope="module")
def open_clip():
    try:
        return import_open_clip()
    except ImportError:
        pytest.skip("open_clip is not installed: it requires torchvision; pip install --no-deps open_clip_torch does")


@pytest.mark.parametrize("kind", [*KINDS, "resnet"])
def test_open_clip_has_the_same_embeddings_of_a_model_from_here(
    open_clip, tiny_config, clip_resnet, tiny_processor, tiny_batch, tmp_path, kind
):
    model = clip_resnet if kind == "resnet" else clip_of_kind(tiny_config(), kind)
    write_open_clip_folder(tmp_path, model, tiny_processor)
    there = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["red circle", "blue bar"])
    assert tokens.shape == (2, 16) and there.visual.preprocess_cfg["resize_mode"] == "squash"
    with torch.no_grad():
        images = there.encode_image(tiny_batch["pixel_values"], normalize=True)
        texts = there.encode_text(tokens, normalize=True)
        ours = tiny_processor.tokenizer(["red circle", "blue bar"], padding=True, return_tensors="pt")
        expected = encode_texts(model, ours["input_ids"], ours["attention_mask"])
        torch.testing.assert_close(images, encode_images(model, tiny_batch["pixel_values"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(there.logit_scale, model.logit_scale, atol=0, rtol=0)


@pytest.mark.parametrize("folder", [FOLDER, RESNET_FOLDER], ids=lambda folder: folder.name)
def test_what_is_kept_of_open_clip_is_what_it_says(open_clip, folder):
    """The folders in `data` were made by this version of open_clip, or by one that computes the same."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        images = model.encode_image(expected["pixel_values"], normalize=True)
    torch.testing.assert_close(images, expected["image_embeds"], atol=1e-6, rtol=0)


def test_a_hub_id_may_have_the_prefix_that_open_clip_gives_it(golden, monkeypatch):
    asked = []

    def download(source: str, **options) -> str:
        asked.append(source)
        return str(golden)

    monkeypatch.setattr(open_clip_folder, "snapshot_download", download)
    for source in ("hf-hub:me/model", "me/model"):
        read_open_clip_folder(source)
    assert asked == ["me/model", "me/model"]
