import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    ChineseCLIPVisionModel,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipTextModel,
    SiglipVisionModel,
    pipeline,
)

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.export.onnx import write_onnx
from clipmap_hf.export.open_clip_folder import write_open_clip_folder
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.models.loading import check_float, load_model
from clipmap_hf.starts import start_mapper
from clipmap_hf.ternary import int8
from clipmap_hf.ternary.config import BACKENDS, METHOD, PARTS, TernaryConfig
from clipmap_hf.ternary.integration import TernaryQuantizer, as_float_config, mark_as_packed, register, swap
from clipmap_hf.ternary.layers import TERNARY, TernaryConv2d, TernaryEmbedding, TernaryLinear, TernaryModule
from clipmap_hf.ternary.model import pack_model, set_backend, sparsity, ternary_modules
from clipmap_hf.ternary.packing import ENCODINGS
from clipmap_hf.ternary.quantizers import GRANULARITIES, dequantized, straight_through, ternarized


ALL = list(PARTS)
CONFIGS = [
    TernaryConfig(parts=ALL, encoding=encoding, granularity=granularity, block_size=16)
    for encoding in ENCODINGS
    for granularity in GRANULARITIES
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda one: f"{one.encoding}-{one.granularity}")


@torch.no_grad()
def embeds(model, batch) -> torch.Tensor:
    return torch.cat(ClipFeatures.embeds(model(**batch)))


@pytest.fixture
def packed(tiny_teacher) -> CLIPModel:
    return pack_model(tiny_teacher, TernaryConfig(parts=ALL))


@pytest.fixture
def int8_always_pays(monkeypatch):
    """However small a layer, and wherever the tests run."""
    monkeypatch.setattr(int8, "_WEIGHTS", 1)
    monkeypatch.setattr(int8, "_FAST_CPU", True)


@pytest.fixture
def folder(packed, tiny_processor, tmp_path):
    packed.save_pretrained(tmp_path / "packed")
    tiny_processor.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize(
    ("part", "modules"),
    [("layers", 6 * (4 + 3)), ("token_embedding", 1), ("projections", 2), ("patch_embedding", 1)],
)
def test_parts_are_these_modules(tiny_teacher, part, modules):
    names = ternary_modules(tiny_teacher, TernaryConfig(parts=[part]))
    assert len(names) == modules
    assert all(type(tiny_teacher.get_submodule(name)) in TERNARY for name in names)


@each_config
def test_a_packed_model_is_the_model_of_its_trits(tiny_teacher, tiny_batch, config):
    weights = [tiny_teacher.get_submodule(name).weight for name in ternary_modules(tiny_teacher, config)]
    packed = pack_model(tiny_teacher, config)
    for weight in weights:
        weight.data = dequantized(*ternarized(weight.data, config.quantizer, config.granularity, config.block_size))
    for backend in ("float", "packed"):
        set_backend(packed, backend)
        torch.testing.assert_close(embeds(packed, tiny_batch), embeds(tiny_teacher, tiny_batch), rtol=0, atol=0)


@each_config
def test_saved_is_loaded_bit_for_bit(tiny_teacher, tiny_batch, tmp_path, config):
    packed = pack_model(tiny_teacher, config)
    packed.save_pretrained(tmp_path)
    loaded, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ours, theirs = packed.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(embeds(loaded, tiny_batch), embeds(packed, tiny_batch), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == ours.keys()


def test_rounding_tokens_to_8_bits_changes_little(packed, tiny_batch, int8_always_pays):
    found = {}
    for backend in BACKENDS:
        set_backend(packed, backend)
        found[backend] = embeds(packed, tiny_batch)
    assert torch.equal(found["auto"], found["int8"]) and not torch.equal(found["int8"], found["float"])
    assert (found["int8"] * found["float"]).sum(-1).min() > 0.9995


def test_small_layers_are_float_by_default(packed, tiny_batch):
    auto = embeds(packed, tiny_batch)
    set_backend(packed, "float")
    torch.testing.assert_close(auto, embeds(packed, tiny_batch), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "fast", "kept"), [(512, True, torch.int8), (511, True, torch.float32), (512, False, torch.float32)]
)
def test_large_layers_are_int8_by_default_where_the_cpu_is_fast_at_it(monkeypatch, rows, fast, kept):
    monkeypatch.setattr(int8, "_FAST_CPU", fast)
    layer = TernaryLinear(torch.nn.Linear(256, rows), TernaryConfig())
    layer.store(*ternarized(torch.randn(rows, 256), "twn", "row", 64))
    with torch.no_grad():
        layer(torch.randn(3, 256))
    assert layer.kept.dtype == kept


def test_int8_needs_one_level_a_row(tiny_teacher, tiny_batch, int8_always_pays):
    packed = pack_model(tiny_teacher, TernaryConfig(granularity="block", block_size=16))
    exact = embeds(packed, tiny_batch)
    set_backend(packed, "float")
    torch.testing.assert_close(exact, embeds(packed, tiny_batch), rtol=0, atol=0)  # which `auto` took
    with pytest.raises(ValueError, match="not blocks"):
        set_backend(packed, "int8")


def test_gradients_reach_the_pixels_of_a_packed_model(packed, tiny_batch, int8_always_pays):
    pixels = tiny_batch["pixel_values"].requires_grad_()
    packed.get_image_features(pixel_values=pixels).pooler_output.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_loaded_models_need_no_gradient_so_that_int8_runs(folder, tiny_batch, int8_always_pays):
    model = CLIPModel.from_pretrained(folder)
    model(**tiny_batch)
    assert model.vision_model.encoder.layers[0].mlp.fc1.kept.dtype == torch.int8


def test_what_was_kept_goes_with_new_weights(tiny_teacher, tiny_batch):
    config = TernaryConfig(parts=ALL)
    packed, other = pack_model(tiny_teacher, config), copy.deepcopy(tiny_teacher)
    embeds(packed, tiny_batch)
    for parameter in other.parameters():
        parameter.data *= 1.5
    other = pack_model(other, config)
    packed.load_state_dict(other.state_dict())
    torch.testing.assert_close(embeds(packed, tiny_batch), embeds(other, tiny_batch), rtol=0, atol=0)


def test_half_precision_checkpoints_are_packed_and_dequantized_in_fp32(tiny_teacher, tiny_batch, tmp_path):
    tiny_teacher.half().save_pretrained(tmp_path)
    stock = pack_model(CLIPModel.from_pretrained(tmp_path), TernaryConfig()).dequantize()
    assert {one.dtype for one in stock.parameters()} == {torch.float32}
    assert embeds(stock, tiny_batch).isfinite().all()


def test_unknown_backends_and_float_models_are_refused(packed, tiny_teacher):
    with pytest.raises(ValueError, match="'int4' is unknown.*'auto'"):
        set_backend(packed, "int4")
    with pytest.raises(ValueError, match="no backends"):
        set_backend(tiny_teacher, "float")


def test_dequantized_models_are_stock_and_give_the_same(folder, tiny_batch, tmp_path):
    packed = CLIPModel.from_pretrained(folder)
    set_backend(packed, "float")
    before = embeds(packed, tiny_batch)
    stock = packed.dequantize()
    assert not any(isinstance(module, TernaryModule) for module in stock.modules())
    torch.testing.assert_close(embeds(stock, tiny_batch), before, rtol=0, atol=0)
    stock.save_pretrained(tmp_path / "float")
    assert "quantization" not in (tmp_path / "float" / "config.json").read_text()
    loaded, info = CLIPModel.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(embeds(loaded, tiny_batch), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "tower", [CLIPVisionModelWithProjection, CLIPVisionModel, CLIPTextModelWithProjection, CLIPTextModel]
)
def test_single_towers_load_from_the_folder_of_both(folder, tiny_batch, tower):
    loaded, info = tower.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    whole = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        if "Vision" in tower.__name__:
            inputs, whole = {"pixel_values": tiny_batch["pixel_values"]}, whole.vision_model
        else:
            inputs, whole = {name: tiny_batch[name] for name in ("input_ids", "attention_mask")}, whole.text_model
        found, expected = loaded(**inputs), whole(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)
    if "Projection" in tower.__name__:
        kind = "image" if "Vision" in tower.__name__ else "text"
        project = getattr(CLIPModel.from_pretrained(folder), f"get_{kind}_features")
        with torch.no_grad():
            embeds = getattr(found, f"{kind}_embeds")
            torch.testing.assert_close(embeds, project(**inputs).pooler_output, rtol=0, atol=0)


def test_auto_classes_and_pipelines_load_the_folder(folder, tiny_pairs):
    assert isinstance(AutoModel.from_pretrained(folder).visual_projection, TernaryLinear)
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    found = classify(tiny_pairs[0]["image"], candidate_labels=["red", "blue"], hypothesis_template="{}")
    assert {one["label"] for one in found} == {"red", "blue"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_float_rest_can_have_half_the_bytes(tiny_teacher, tiny_batch, tmp_path, dtype):
    pack_model(tiny_teacher, TernaryConfig(), dtype=dtype).save_pretrained(tmp_path)
    half, exact = CLIPModel.from_pretrained(tmp_path), CLIPModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert half.dtype == dtype and exact.dtype == torch.float32
    batch = {**tiny_batch, "pixel_values": tiny_batch["pixel_values"].to(dtype)}
    assert (embeds(half, batch) * embeds(exact, tiny_batch)).sum(-1).min() > 0.99


LOAD = """
import sys
{imported}
from transformers import CLIPModel
model = CLIPModel.from_pretrained(sys.argv[1])
print(type(model.visual_projection).__name__)
"""


def load_in_a_process(folder, imported: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LOAD.format(imported=imported), folder]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["import clipmap_hf", "import transformers.quantizers.auto, clipmap_hf"])
def test_a_fresh_process_loads_the_folder_after_the_import(folder, imported):
    done = load_in_a_process(folder, imported)
    assert done.stdout.strip() == "TernaryLinear", done.stderr


@pytest.mark.slow
def test_without_the_import_loading_is_an_error(folder):
    done = load_in_a_process(folder, "")
    assert done.returncode != 0 and not done.stdout and "mismatch" in done.stderr.lower()


def test_importing_the_package_does_not_wait_for_torch():
    code = "import sys, clipmap_hf; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def corrupted(
    tensors: dict[str, torch.Tensor], what: str, module: str = "vision_model.encoder.layers.0.mlp.fc1"
) -> dict[str, torch.Tensor]:
    name = f"{module}.weight"
    changes = {
        "bytes": {name: torch.full_like(tensors[name], 255)},
        "levels": {f"{name}_scale": torch.full_like(tensors[f"{name}_scale"], float("nan"))},
        "negative": {f"{name}_scale": -tensors[f"{name}_scale"]},
        "zero": {f"{name}_scale": torch.zeros_like(tensors[f"{name}_scale"])},
        "integers": {f"{name}_scale": tensors[f"{name}_scale"].to(torch.int32)},
        "wide bytes": {name: tensors[name].to(torch.int32)},
        "shape": {name: tensors[name][:, 1:].contiguous()},
    }
    return {**tensors, **changes[what]}


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("bytes", ValueError, "layers.0.mlp.fc1.*corrupt"),
        ("levels", ValueError, "layers.0.mlp.fc1.*finite"),
        ("negative", ValueError, "layers.0.mlp.fc1.*negative"),
        ("zero", ValueError, "layers.0.mlp.fc1.*level is zero.*corrupt"),
        ("integers", ValueError, "layers.0.mlp.fc1.*uint8 and float16, not.*int32"),
        ("wide bytes", ValueError, "layers.0.mlp.fc1.*uint8 and float16, not.*int32"),
        ("shape", RuntimeError, "mismatch"),
    ],
)
def test_corrupt_files_are_refused(folder, what, error, match):
    path = folder / "model.safetensors"
    save_file(corrupted(load_file(path), what), path, metadata={"format": "pt"})
    with pytest.raises(error, match=match):
        CLIPModel.from_pretrained(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["weight", "weight_scale"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_files_that_lack_a_tensor_are_refused(tiny_teacher, tmp_path, part, kind, granularity):
    (name, *_) = ternary_modules(tiny_teacher, TernaryConfig(parts=[part]))
    pack_model(tiny_teacher, TernaryConfig(parts=ALL, granularity=granularity)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{name}.{kind}"]
    save_file(tensors, path, metadata={"format": "pt"})
    for load in (CLIPModel.from_pretrained, load_model):
        with pytest.raises(ValueError, match=rf"{name}\.{kind} is missing"):
            load(str(tmp_path))


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_towers_that_lack_a_tensor_are_refused_and_the_other_tower_loads(tiny_teacher, tmp_path, size):
    """Also where the file is one of several, and the other tower has a tensor of that name."""
    pack_model(tiny_teacher, TernaryConfig(parts=ALL)).save_pretrained(tmp_path, max_shard_size=size)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    (path,) = [one for one in tmp_path.glob("*.safetensors") if name in load_file(one)]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    for model in (CLIPTextModel, CLIPTextModelWithProjection):
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            model.from_pretrained(tmp_path)
    CLIPVisionModel.from_pretrained(tmp_path)


def test_a_tower_that_was_saved_alone_lacks_nothing(folder, tmp_path):
    for model in (CLIPTextModel, CLIPVisionModelWithProjection):
        tower = model.from_pretrained(folder)
        tower.save_pretrained(tmp_path / model.__name__)
        again = model.from_pretrained(tmp_path / model.__name__)
        torch.testing.assert_close(again.state_dict(), tower.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", ["bytes", "levels"])
def test_corrupt_state_dicts_are_refused(packed, tiny_batch, part, what):
    (name, *_) = ternary_modules(packed.dequantize(), TernaryConfig(parts=[part]))
    packed = pack_model(packed, TernaryConfig(parts=ALL))
    good = {key: value.clone() for key, value in packed.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{name}: .*(corrupt|finite)"):
        packed.load_state_dict(corrupted(packed.state_dict(), what, name))
    before = embeds(packed, tiny_batch) if part == "patch_embedding" else None
    packed.load_state_dict(good)
    after = embeds(packed, tiny_batch)
    assert before is None or torch.equal(before, after)  # an error that is caught leaves what was there


def test_folders_of_several_files_are_loaded(packed, tiny_batch, tmp_path):
    packed.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        embeds(CLIPModel.from_pretrained(tmp_path), tiny_batch), embeds(packed, tiny_batch), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"quantizer": "best"}, ValueError, "quantizer='best' is unknown"),
        ({"format": 2}, ValueError, "format=2"),
        ({"encoding": "zip"}, ValueError, "encoding='zip'"),
        ({"parts": ["head"]}, ValueError, "parts="),
        ({"parts": ["layers", "layers"]}, ValueError, "names something twice"),
        ({"modules": [1]}, TypeError, "must be a list of strings"),
        ({"modules": ["visual_projection"] * 2}, ValueError, "names something twice"),
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"block_size": "64"}, ValueError, "block_size='64' must be an integer"),
        ({"block_size": 64.0}, ValueError, "block_size=64.0 must be an integer"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"modules": []}, ValueError, "names no modules"),
        ({"modules": ["visoin_model.head"]}, ValueError, "visoin_model.head, which the model does not have"),
        ({"modules": ["vision_model.head"]}, ValueError, "vision_model.head, which the model does not have"),
        ({"modules": ["vision_model.post_layernorm"]}, ValueError, "LayerNorm, which cannot be ternary"),
    ],
)
def test_foreign_configs_are_refused(folder, change, error, match):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=match):
        CLIPModel.from_pretrained(folder)


def test_a_float_model_is_not_made_ternary_on_loading(teacher_folder):
    with pytest.raises(ValueError, match="pre-quantized"):
        CLIPModel.from_pretrained(teacher_folder, quantization_config=TernaryConfig())


def test_weights_too_large_for_a_level_are_refused(tiny_teacher):
    tiny_teacher.visual_projection.weight.data *= 1e7
    with pytest.raises(ValueError, match="fp16"):
        pack_model(tiny_teacher, TernaryConfig(parts=["projections"]))


def test_weights_too_small_for_a_level_are_refused(tiny_teacher):
    tiny_teacher.visual_projection.weight.data *= 1e-8
    with pytest.raises(ValueError, match="smallest fp16"):
        pack_model(tiny_teacher, TernaryConfig(parts=["projections"]))


def test_rows_too_small_for_a_level_are_rows_of_zeros(tiny_teacher):
    weight = tiny_teacher.visual_projection.weight
    weight.data[3] *= 1e-8
    packed = pack_model(tiny_teacher, TernaryConfig(parts=["projections"]))
    seen = straight_through(weight, "twn", "row", 64)
    torch.testing.assert_close(packed.visual_projection.float_weight(), seen, rtol=0, atol=0)
    assert not packed.visual_projection.trits()[3].any()


def test_what_is_not_ternary_must_fit_its_dtype(tiny_teacher):
    tiny_teacher.text_model.encoder.layers[0].mlp.fc1.bias.data[0] = 1e5
    with pytest.raises(ValueError, match="layers.0.mlp.fc1.bias has values too large for torch.float16"):
        pack_model(tiny_teacher, TernaryConfig(), dtype=torch.float16)


def test_packed_models_are_not_packed_again(packed):
    with pytest.raises(ValueError, match="Packing works with float weights"):
        pack_model(packed, TernaryConfig())


@pytest.mark.parametrize("ids", [[-1], [10**6]])
def test_tokens_that_are_not_in_the_table_are_refused(packed, ids):
    with pytest.raises(IndexError):
        packed.text_model.embeddings.token_embedding(torch.tensor(ids))


@pytest.mark.parametrize("options", [{"dilation": 2}, {"groups": 3}, {"stride": 2, "padding": 1}])
def test_convolutions_of_any_kind_give_what_their_float_modules_do(options):
    module = torch.nn.Conv2d(3, 6, 3, **options)
    ternary = TernaryConv2d(module, TernaryConfig(granularity="row"))
    ternary.store(*ternarized(module.weight.detach(), "twn", "row", 64))
    ternary.ready(torch.float32)
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(ternary.float_module(torch.float32)(images), ternary(images), rtol=0, atol=0)


def test_convolutions_that_mirror_their_borders_are_refused():
    with pytest.raises(ValueError, match="padding_mode='reflect' cannot be ternary"):
        TernaryConv2d(torch.nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), TernaryConfig())


def test_a_printed_module_says_its_size(packed):
    assert repr(packed.visual_projection).startswith("TernaryLinear((32, ")


def test_modules_that_are_not_there_are_refused(tiny_teacher):
    with pytest.raises(ValueError, match="names foo.bar, which the model does not have"):
        pack_model(tiny_teacher, TernaryConfig(modules=["foo.bar"]))


def test_new_trits_are_those_that_run(packed, tiny_batch):
    layer, before = packed.visual_projection, embeds(packed, tiny_batch)
    layer.store(layer.trits().flip(0), layer.weight_scale)
    assert not torch.equal(embeds(packed, tiny_batch), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_are_no_error(packed, backend):
    set_backend(packed, backend)
    assert packed.visual_projection(torch.empty(0, 64)).shape == (0, 32)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["float", "int8"])
def test_compiled_models_give_the_same(packed, tiny_batch, backend):
    set_backend(packed, backend)
    compiled = torch.compile(copy.deepcopy(packed), backend="aot_eager")
    found, again, expected = embeds(compiled, tiny_batch), embeds(compiled, tiny_batch), embeds(packed, tiny_batch)
    assert (found * expected).sum(-1).min() > 0.9999 and (again * expected).sum(-1).min() > 0.9999
    assert compiled.visual_projection.kept is not None  # made once, though nothing ran before


def test_what_works_with_float_weights_refuses_packed_ones(packed, tiny_processor, tmp_path):
    small = ClipMapConfig(vision=TowerConfig(32, 2), text=TowerConfig(32, 2), initializer="diagonal")
    for work in (
        lambda: start_mapper(packed, small),
        lambda: write_onnx(tmp_path, packed, tiny_processor),
        lambda: write_open_clip_folder(tmp_path, packed, tiny_processor),
    ):
        with pytest.raises(ValueError, match="works with float weights.*dequantize"):
            work()
    check_float(packed.dequantize(), "Mapping")


def test_each_part_must_be_there(tiny_teacher):
    del tiny_teacher.text_model.embeddings.token_embedding
    with pytest.raises(ValueError, match="of the part 'token_embedding'"):
        ternary_modules(tiny_teacher, TernaryConfig())


@pytest.mark.parametrize("tower", [SiglipVisionModel, SiglipTextModel, ChineseCLIPVisionModel])
def test_single_towers_of_other_families_load_too(tower, tiny_batch, tmp_path, request):
    whole = copy.deepcopy(request.getfixturevalue("siglip" if "Siglip" in tower.__name__ else "chinese_clip"))
    whole = pack_model(whole, TernaryConfig())
    whole.save_pretrained(tmp_path)
    loaded, info = tower.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    name, part = ("input_ids", whole.text_model) if "Text" in tower.__name__ else ("pixel_values", whole.vision_model)
    with torch.no_grad():
        found, expected = loaded(tiny_batch[name]), part(tiny_batch[name])
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["siglip", "chinese_clip"])
def test_other_families_have_the_same_parts(model_type, tiny_batch, tmp_path, request):
    model = copy.deepcopy(request.getfixturevalue(model_type))
    packed = pack_model(model, TernaryConfig(parts=ALL))
    left = [name for name, module in packed.named_modules() if type(module) in TERNARY]
    assert all(re.search("position_embedding|token_type_embeddings|pooler", name) for name in left)
    packed.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(embeds(loaded, tiny_batch), embeds(packed, tiny_batch), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_stay_as_they_are_when_a_model_is_cast(packed, folder, tiny_batch, dtype):
    before = packed.state_dict()
    cast = packed.to(dtype)
    for name, tensor in cast.state_dict().items():
        if name.endswith("weight_scale") or before[name].dtype == torch.uint8:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    batch = {**tiny_batch, "pixel_values": tiny_batch["pixel_values"].to(dtype)}
    loaded = CLIPModel.from_pretrained(folder, dtype=dtype)
    torch.testing.assert_close(embeds(cast, batch), embeds(loaded, batch), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loaded", "cast", "asked"),
    [
        (None, torch.bfloat16, None),
        (None, torch.float16, None),
        (torch.float16, torch.float32, None),
        (None, None, torch.float16),
    ],
    ids=str,
)
def test_models_are_dequantized_in_one_dtype(folder, tiny_batch, loaded, cast, asked):
    model = CLIPModel.from_pretrained(folder, dtype=loaded or torch.float32)
    model = model if cast is None else model.to(cast)
    stock, dtype = model.dequantize(asked), asked or cast
    assert {parameter.dtype for parameter in stock.parameters()} == {stock.config.dtype} == {dtype}
    assert embeds(stock, {**tiny_batch, "pixel_values": tiny_batch["pixel_values"].to(dtype)}).isfinite().all()


def test_a_cast_and_one_back_change_nothing(packed, tiny_batch):
    set_backend(packed, "float")
    casts = copy.deepcopy(packed).to(torch.float64).to(torch.float32)
    torch.testing.assert_close(embeds(casts, tiny_batch), embeds(packed, tiny_batch), rtol=0, atol=0)
    patches = packed.to(torch.bfloat16).to(torch.float32).vision_model.embeddings.patch_embedding
    torch.testing.assert_close(patches.weight, patches.float_weight(), rtol=0, atol=0)


def test_copies_leave_out_what_was_kept(packed, tiny_batch):
    before = embeds(packed, tiny_batch)
    copied = copy.deepcopy(packed)
    assert all(module.kept is None for module in copied.modules() if isinstance(module, TernaryModule))
    torch.testing.assert_close(embeds(copied, tiny_batch), before, rtol=0, atol=0)


def test_int8_that_was_asked_for_is_never_replaced(packed, tiny_batch):
    set_backend(packed, "int8")
    with pytest.raises(ValueError, match="'int8' has no gradient"):
        packed.get_image_features(pixel_values=tiny_batch["pixel_values"].requires_grad_())


def test_sparsity_is_the_share_of_zeros(packed):
    trits = [module.trits().flatten() for module in packed.modules() if isinstance(module, TernaryModule)]
    torch.testing.assert_close(sparsity(packed), (torch.cat(trits) == 0).float().mean().item())
    with pytest.raises(ValueError, match="has no trits"):
        sparsity(packed.dequantize())


def test_only_looked_up_rows_of_an_embedding_are_unpacked(packed):
    table = packed.text_model.embeddings.token_embedding
    ids = torch.tensor([[3, 0], [3, 5]])
    assert isinstance(table, TernaryEmbedding)
    torch.testing.assert_close(table(ids), table.float_weight()[ids], rtol=0, atol=0)


def test_a_convolution_is_packed_in_the_state_dict_only(packed):
    patches = packed.vision_model.embeddings.patch_embedding
    assert isinstance(patches, TernaryConv2d) and patches.weight.dtype == torch.float32
    assert packed.state_dict()["vision_model.embeddings.patch_embedding.weight"].dtype == torch.uint8


def test_a_model_of_a_packed_model_s_config_can_be_float(packed, tmp_path):
    CLIPModel(as_float_config(copy.deepcopy(packed.config))).save_pretrained(tmp_path)
    assert not any(isinstance(module, TernaryModule) for module in load_model(str(tmp_path)).modules())


def test_registering_twice_is_registering_once(tiny_teacher):
    register()
    register()
    swap(tiny_teacher, TernaryConfig(modules=["visual_projection"]))
    mark_as_packed(tiny_teacher, TernaryQuantizer(TernaryConfig(modules=["visual_projection"])))
    assert tiny_teacher.config.vision_config.quantization_config["quant_method"] == METHOD


def test_strict_loading_takes_packed_folders(folder, packed, tiny_batch):
    loaded = load_model(str(folder))
    torch.testing.assert_close(embeds(loaded, tiny_batch), embeds(packed, tiny_batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["text_model.final_layer_norm.bias", "text_model.encoder.layers.0.mlp.fc1.bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strict_loading_refuses_packed_folders_that_are_not_finite(tiny_teacher, tmp_path, dtype, name):
    pack_model(tiny_teacher, TernaryConfig(), dtype=dtype).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"not finite.*'{name}'"):
        load_model(str(tmp_path))


def test_a_model_that_was_saved_can_be_dequantized(packed, tmp_path):
    packed.save_pretrained(tmp_path)  # which leaves the config's dtype a string
    assert packed.dequantize().dtype == torch.float32
