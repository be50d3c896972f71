import copy
import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from calibrated_starts import random_pairs, split
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.clip.modeling_clip import CLIPOutput

import clipmap_hf.hub.map_folder
from clipmap_hf import Budget, ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.data.calibration_pairs import sampled_pairs
from clipmap_hf.data.pairs import holds_pairs, load_pairs
from clipmap_hf.distributed import calibration_device
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.shapes import choose_shape, kept_energy
from clipmap_hf.starts import start_mapper


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2),
    text=TowerConfig(hidden_size=32, num_hidden_layers=2),
    initializer="diagonal",
    depth="spread",
)
SMALL_CALIBRATED = dataclasses.replace(SMALL, initializer="calibrated", refit=False)
MAP_FILES = {"clipmap_config.json", "clipmap.safetensors"}


def perturbed(compressor: ClipMapCompressor) -> ClipMapCompressor:
    """Moves the operators away from their start, as training does."""
    generator = torch.Generator().manual_seed(1)
    for operator in compressor.mapper.operators.values():
        operator.delta.data += 0.05 * torch.randn(operator.delta.shape, generator=generator)
    return compressor.eval()


@pytest.fixture(scope="module")
def shared_compressor(teacher_folder) -> ClipMapCompressor:
    return perturbed(ClipMapCompressor.from_pretrained(teacher_folder, student=SMALL))


@pytest.fixture(scope="module")
def saved_folder(shared_compressor, tmp_path_factory) -> Path:
    """What `save_pretrained` writes; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    shared_compressor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_folder, tmp_path) -> Path:
    """A copy of `saved_folder` to tamper with."""
    return shutil.copytree(saved_folder, tmp_path / "copy")


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=0, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


# One object


def test_forward_is_the_students_output(shared_compressor, tiny_batch):
    with torch.no_grad():
        output = shared_compressor(**tiny_batch)
        expected = shared_compressor.export()(**tiny_batch)
    assert isinstance(output, CLIPOutput)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image, atol=0, rtol=0)


def test_gradients_reach_the_operators_only(teacher_folder, tiny_batch):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, student=SMALL)
    compressor(**tiny_batch).logits_per_image.sum().backward()
    reached = {name for name, p in compressor.named_parameters() if p.grad is not None}
    assert reached == {f"mapper.operators.{name}.delta" for name in compressor.mapper.operators}


def test_an_unmoved_compressor_of_the_same_size_is_the_teacher(teacher_folder, shared_teacher, tiny_batch):
    compressor = ClipMapCompressor.from_pretrained(str(teacher_folder), student=ClipMapConfig()).eval()
    with torch.no_grad():
        mapped, expected = compressor(**tiny_batch), shared_teacher(**tiny_batch)
    torch.testing.assert_close(mapped.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=0)


def test_cost_compares_teacher_and_student(shared_compressor, shared_teacher):
    cost = shared_compressor.cost()
    assert cost["teacher"].parameters == shared_teacher.num_parameters()
    assert cost["student"].parameters == shared_compressor.export().num_parameters()
    header, _, teacher, student, _, note = str(cost).splitlines()
    assert header.startswith("| model") and teacher.startswith("| teacher") and student.startswith("| student")
    assert note.startswith("Attention heads: vision 2 of 16 channels, as wide as the teacher's; text ")


def test_export_is_a_plain_clip_model_of_the_size_asked_for(shared_compressor):
    student = shared_compressor.export()
    assert type(student) is CLIPModel
    assert (student.config.vision_config.hidden_size, student.config.vision_config.num_hidden_layers) == (32, 2)
    assert shared_compressor.map_config == SMALL


def test_half_precision_is_for_loading_only(teacher_folder, tiny_batch):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, student=SMALL, dtype=torch.float16).eval()
    exported = compressor.export()
    assert {tensor.dtype for tensor in exported.state_dict().values()} == {torch.float32}
    with torch.no_grad():
        mapped, expected = compressor(**tiny_batch), exported(**tiny_batch)
    torch.testing.assert_close(mapped.image_embeds, expected.image_embeds, atol=0, rtol=0)


@pytest.mark.parametrize("student", ["medium", "Small", ""])
def test_an_unknown_preset_is_an_error_that_lists_the_presets(teacher_folder, student):
    with pytest.raises(ValueError, match=f"student='{student}' is unknown.*'resnet-30m', 'small', 'tiny'"):
        ClipMapCompressor.from_pretrained(teacher_folder, student=student)


@pytest.mark.parametrize(
    "student",
    [{"params": "100k"}, Budget(params="100k"), ClipMapConfig(budget={"params": "100k"})],
    ids=["by name", "budget", "config"],
)
def test_a_budget_gives_the_shape_that_is_chosen_for_it(teacher_folder, shared_teacher, student, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, student)
    expected = choose_shape(shared_teacher.config, ClipMapConfig(budget={"params": "100k"}, initializer="diagonal"))
    assert compressor.map_config == expected.config and str(compressor.choice) == str(expected)
    assert compressor.cost()["student"].parameters == expected.candidates[0].cost <= 100_000
    compressor.save_pretrained(tmp_path)
    again = ClipMapCompressor.from_pretrained(tmp_path)
    assert again.map_config == expected.config and again.choice is None


def test_with_data_the_shape_is_the_one_that_keeps_most(teacher_folder, shared_teacher, batches):
    config = ClipMapConfig(budget={"params": "100k"}, initializer="importance")
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, config, calibration_data=batches)
    expected = choose_shape(shared_teacher.config, config, kept_energy(shared_teacher, batches))
    assert compressor.map_config == expected.config and str(compressor.choice) == str(expected)


def test_a_student_that_does_not_fit_is_an_error_that_says_what_would(teacher_folder):
    with pytest.raises(ValueError, match=r"vision\.hidden_size=256 must be an integer from 1 to the teacher's 64"):
        ClipMapCompressor.from_pretrained(teacher_folder, student="small")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="no-such-model"):
        ClipMapCompressor.from_pretrained(tmp_path / "no-such-model", student=SMALL)


@pytest.mark.parametrize("how", ["model", "teacher", "mapper"])
def test_a_teacher_in_memory_that_is_not_finite_is_refused_by_name(teacher_folder, tiny_processor, how):
    model = CLIPModel.from_pretrained(teacher_folder)
    model.visual_projection.weight.data[0, 0] = torch.nan
    start = {
        "model": lambda: ClipMapCompressor.from_pretrained(model, SMALL),
        "teacher": lambda: Teacher(model, tiny_processor, "me/teacher"),
        "mapper": lambda: start_mapper(model, SMALL),
    }[how]
    with pytest.raises(ValueError, match=r"not finite.*'visual_projection\.weight'"):
        start()


def test_a_teacher_that_lacks_a_tensor_is_an_error_that_names_it(teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: \['text_projection\.weight'\]"):
        ClipMapCompressor.from_pretrained(folder, student=SMALL)


# The student folder


def test_a_saved_folder_holds_student_processor_card_and_map(saved_folder):
    files = {path.name for path in saved_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "map"} <= files
    assert {path.name for path in (saved_folder / "map").iterdir()} == MAP_FILES
    assert not [path for path in saved_folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_model_safetensors_holds_the_students_tensors_only(shared_compressor, saved_folder):
    written, student = load_file(saved_folder / "model.safetensors"), shared_compressor.export().state_dict()
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in student.items()}
    tensor_bytes = 4 * sum(tensor.numel() for tensor in student.values())
    assert 0 <= (saved_folder / "model.safetensors").stat().st_size - tensor_bytes < 20_000  # the header


def test_plain_transformers_loads_the_student(shared_compressor, saved_folder, tiny_batch):
    loaded = CLIPModel.from_pretrained(saved_folder).eval()
    assert_same(loaded, shared_compressor.export())
    with torch.no_grad():
        mapped, expected = loaded(**tiny_batch), shared_compressor(**tiny_batch)
    torch.testing.assert_close(mapped.logits_per_image, expected.logits_per_image, atol=0, rtol=0)


def test_plain_transformers_loads_each_tower(shared_compressor, saved_folder, tiny_batch):
    vision = CLIPVisionModelWithProjection.from_pretrained(saved_folder).eval()
    text = CLIPTextModelWithProjection.from_pretrained(saved_folder).eval()
    inputs = {name: tiny_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = shared_compressor.export()(**tiny_batch)
        image_embeds = vision(pixel_values=tiny_batch["pixel_values"]).image_embeds
        text_embeds = text(**inputs).text_embeds
    for actual, wanted in ((image_embeds, expected.image_embeds), (text_embeds, expected.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(actual, dim=-1), wanted, atol=1e-6, rtol=0)


def test_a_smaller_joint_embedding_loads_into_each_tower(teacher_folder, tmp_path):
    config = ClipMapConfig(vision=TowerConfig(32), text=TowerConfig(32), projection_dim=16)
    ClipMapCompressor.from_pretrained(teacher_folder, student=config).save_pretrained(tmp_path, include_map=False)
    assert CLIPVisionModelWithProjection.from_pretrained(tmp_path).visual_projection.weight.shape == (16, 32)
    assert CLIPTextModelWithProjection.from_pretrained(tmp_path).text_projection.weight.shape == (16, 32)


def test_the_zero_shot_pipeline_runs_on_a_saved_folder(shared_compressor, saved_folder, tiny_pairs, tiny_processor):
    classify = pipeline("zero-shot-image-classification", model=str(saved_folder), device="cpu")
    labels = ["red circle", "blue bar", "green pie"]
    scores = {
        entry["label"]: entry["score"]
        for entry in classify(tiny_pairs[0]["image"], candidate_labels=labels, hypothesis_template="{}")
    }
    inputs = tiny_processor(text=labels, images=tiny_pairs[0]["image"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = shared_compressor.export()(**inputs).logits_per_image.softmax(dim=-1)[0]
    torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected, atol=1e-5, rtol=0)


def test_the_processor_is_the_teachers(saved_folder, tiny_pairs, tiny_processor):
    loaded = CLIPProcessor.from_pretrained(saved_folder, backend="pil")
    row = tiny_pairs[1]
    mine, theirs = (
        processor(text=[row["caption"]], images=[row["image"]], return_tensors="pt")
        for processor in (loaded, tiny_processor)
    )
    assert mine["input_ids"].tolist() == theirs["input_ids"].tolist()
    torch.testing.assert_close(mine["pixel_values"], theirs["pixel_values"], atol=0, rtol=0)


# Starting from data

OPEN = dataclasses.replace(SMALL, initializer=None, depth="interval_front", refit=False)


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    return split(random_pairs(shared_teacher.config, 16), 8)


@pytest.fixture(scope="module")
def calibrated_compressor(teacher_folder, batches) -> ClipMapCompressor:
    config = dataclasses.replace(OPEN, refit=True, refit_steps=2)
    return ClipMapCompressor.from_pretrained(teacher_folder, config, calibration_data=batches)


@pytest.fixture
def calibration_data(request, pairs_parquet, pairs_tars, batches) -> object:
    """Anything that calibration reads."""
    rows = load_pairs(str(pairs_parquet))
    stream = load_pairs(pairs_tars, image_column="png", caption_columns=["txt"], streaming=True)
    return {
        "path": str(pairs_parquet),
        "Path": pairs_parquet,
        "data set": rows,
        "dict of one split": DatasetDict(train=rows),
        "list": [(row["image"]["bytes"], row["caption"]) for row in rows],
        "images": rows.remove_columns("caption"),
        "stream": stream.rename_column("txt", "caption"),
        "stream of images": stream,
        "batches": batches,
        "loader": torch.utils.data.DataLoader(
            [{name: tensor[0] for name, tensor in batch.items()} for batch in batches * 8], 8
        ),
    }[request.param]


SOURCES = [
    "path",
    "Path",
    "data set",
    "dict of one split",
    "list",
    "images",
    "stream",
    "stream of images",
    "batches",
    "loader",
]


@pytest.mark.parametrize("calibration_data", SOURCES, indirect=True)
def test_a_start_from_data_is_that_of_its_pairs(
    teacher_folder, shared_teacher, tiny_processor, calibration_data, request
):
    caption = None if "images" in request.node.callspec.id else "caption"
    compressor = ClipMapCompressor.from_pretrained(
        teacher_folder, OPEN, calibration_data=calibration_data, calibration_pairs=9, caption_column=caption
    )
    assert compressor.map_config == dataclasses.replace(OPEN, initializer="calibrated")
    if holds_pairs(calibration_data):
        calibration_data = sampled_pairs(calibration_data, tiny_processor, 9, caption_column=caption)
        assert sum(len(batch["pixel_values"]) for batch in calibration_data) == 9
    teacher = copy.deepcopy(shared_teacher).to(calibration_device())
    mapper = start_mapper(teacher, compressor.map_config, calibration_data)
    assert_same(compressor.export(), mapper.export())


def test_by_default_the_initializer_follows_from_the_data(teacher_folder, batches):
    with_data = ClipMapCompressor.from_pretrained(teacher_folder, OPEN, calibration_data=batches)
    without = ClipMapCompressor.from_pretrained(teacher_folder, OPEN)
    assert (with_data.map_config.initializer, without.map_config.initializer) == ("calibrated", "diagonal")
    diagonal = ClipMapCompressor.from_pretrained(teacher_folder, OPEN, initializer="diagonal")
    assert_same(diagonal.export(), without.export())
    assert OPEN.initializer is None


@pytest.mark.parametrize("initializer", ["calibrated", "importance"])
def test_an_initializer_may_stand_in_the_config_or_beside_it(teacher_folder, batches, initializer):
    named = dataclasses.replace(OPEN, initializer=initializer)
    first, second, third = (
        ClipMapCompressor.from_pretrained(teacher_folder, config, calibration_data=batches, initializer=name)
        for config, name in ((named, None), (OPEN, initializer), (named, initializer))
    )
    assert first.map_config == second.map_config == third.map_config == named
    assert_same(second.export(), first.export())


@pytest.mark.parametrize(
    ("config", "initializer", "data", "message"),
    [
        (
            OPEN,
            "importance",
            False,
            r"initializer='importance' needs calibration_data. .* \['calibrated', 'calibrated_whole', 'importance'",
        ),
        (OPEN, "calibrated", False, "initializer='calibrated' needs calibration_data"),
        (dataclasses.replace(OPEN, initializer="calibrated"), None, False, "'calibrated' needs calibration_data"),
        (OPEN, "diagonal", True, "initializer='diagonal' does not start from data; leave calibration_data out"),
        (SMALL, None, True, "initializer='diagonal' does not start from data"),
        (SMALL, "random", False, "initializer='random', but the student's config says 'diagonal'"),
        (SMALL, "calibrated", True, "initializer='calibrated', but the student's config says 'diagonal'"),
        (OPEN, "svd", False, r"initializer='svd' is unknown; allowed are \['calibrated', 'calibrated_whole'"),
        (OPEN, "svd", True, r"initializer='svd' is unknown; allowed are \['calibrated', 'calibrated_whole'"),
        ("huge", None, True, "student='huge' is unknown; it must be one of .*'resnet-30m', 'small', 'tiny'"),
        (
            dataclasses.replace(OPEN, depth="similarity"),
            None,
            False,
            "depth='similarity' is no rule of",
        ),
        (None, "calibrated", False, "A map that is gone on with has started already; leave initializer and data out"),
        (None, None, True, "A map that is gone on with has started already"),
    ],
)
def test_starts_without_sense_are_errors(saved_folder, batches, config, initializer, data, message):
    with pytest.raises(ValueError, match=message):
        ClipMapCompressor.from_pretrained(
            saved_folder, config, initializer=initializer, calibration_data=batches if data else None
        )


def test_a_preset_too_large_for_its_teacher_is_an_error_before_any_calibration(teacher_folder):
    with pytest.raises(ValueError, match="hidden_size=128 .* teacher's 64"):
        ClipMapCompressor.from_pretrained(teacher_folder, "tiny", calibration_data=[{}])


def test_batches_that_cannot_be_read_twice_are_an_error(teacher_folder, batches):
    with pytest.raises(TypeError, match="several times"):
        ClipMapCompressor.from_pretrained(teacher_folder, OPEN, calibration_data=iter(batches))


def test_bad_calibration_rows_are_left_out_and_too_many_are_an_error(teacher_folder, pairs_parquet):
    rows = load_pairs(str(pairs_parquet))
    some, most = (
        rows.map(lambda row, index, bad=bad: row | {"image": None} if index < bad else row, with_indices=True)
        for bad in (4, 20)
    )
    start = ClipMapCompressor.from_pretrained(teacher_folder, OPEN, calibration_data=some)
    assert all(tensor.isfinite().all() for tensor in start.export().state_dict().values())
    with pytest.raises(ValueError, match=r"20 \(20 no image\) cannot be used"):
        ClipMapCompressor.from_pretrained(teacher_folder, OPEN, calibration_data=most)


def test_plain_transformers_loads_a_calibrated_student(calibrated_compressor, tiny_batch, tmp_path):
    calibrated_compressor.save_pretrained(tmp_path / "out")
    loaded = CLIPModel.from_pretrained(tmp_path / "out").eval()
    assert_same(loaded, calibrated_compressor.export())
    with torch.no_grad():
        mapped, expected = loaded(**tiny_batch), calibrated_compressor(**tiny_batch)
    torch.testing.assert_close(mapped.logits_per_image, expected.logits_per_image, atol=0, rtol=0)


def test_a_calibrated_map_goes_on_where_it_was_saved(calibrated_compressor, tiny_batch, tmp_path):
    calibrated_compressor.save_pretrained(tmp_path / "out")
    loaded = ClipMapCompressor.from_pretrained(tmp_path / "out")
    assert_same(loaded.mapper, calibrated_compressor.mapper)
    assert_same(loaded.export(), calibrated_compressor.export())
    assert loaded.map_config == calibrated_compressor.map_config and loaded.map_config.initializer == "calibrated"
    loaded.train()(**tiny_batch).logits_per_image.sum().backward()
    trained = [part.delta for part in (*loaded.mapper.operators.values(), *loaded.mapper.corrections.values())]
    assert loaded.mapper.corrections and all(delta.grad is not None for delta in trained)
    with torch.no_grad():
        for delta in trained:
            delta -= 1e-3 * delta.grad
    loaded.eval().save_pretrained(tmp_path / "again")
    assert_same(ClipMapCompressor.from_pretrained(tmp_path / "again").export(), loaded.export())
    assert not torch.equal(
        loaded.export().visual_projection.weight, calibrated_compressor.export().visual_projection.weight
    )


# Going on with a map


def test_a_map_goes_on_where_it_was_saved(shared_compressor, saved_folder, teacher_folder):
    loaded = ClipMapCompressor.from_pretrained(saved_folder)
    assert_same(loaded.mapper, shared_compressor.mapper)
    assert_same(loaded.export(), shared_compressor.export())
    assert loaded.map_config == SMALL
    assert loaded.teacher_id == str(teacher_folder)


def test_a_map_is_saved_twice_the_same(saved_folder, tmp_path):
    ClipMapCompressor.from_pretrained(saved_folder).save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "map/clipmap.safetensors", "map/clipmap_config.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved_folder / name).read_bytes()


def test_without_its_map_a_folder_is_smaller(shared_compressor, tmp_path):
    shared_compressor.save_pretrained(tmp_path / "out", include_map=False)
    assert not (tmp_path / "out" / "map").exists()
    assert_same(CLIPModel.from_pretrained(tmp_path / "out"), shared_compressor.export())


def test_a_compressed_model_is_a_teacher_too(saved_folder, tiny_batch):
    config = ClipMapConfig(vision=TowerConfig(hidden_size=16), text=TowerConfig(hidden_size=16, num_hidden_layers=1))
    compressor = ClipMapCompressor.from_pretrained(saved_folder, student=config).eval()
    assert compressor.teacher_id == str(saved_folder)
    teacher, student = CLIPModel.from_pretrained(saved_folder).state_dict(), compressor.export().state_dict()
    name = "vision_model.encoder.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(student[name], teacher[name][:16, :16], atol=0, rtol=0)
    assert compressor(**tiny_batch).image_embeds.shape == (8, 32)


def test_a_folder_without_map_is_an_error_that_says_what_to_give(teacher_folder):
    with pytest.raises(ValueError, match=r"holds no map/clipmap_config\.json.*'resnet-30m', 'small', 'tiny'"):
        ClipMapCompressor.from_pretrained(teacher_folder)


def test_a_map_without_weights_is_an_error_that_names_the_file(folder):
    (folder / "map" / "clipmap.safetensors").unlink()
    with pytest.raises(OSError, match=r"has map/clipmap_config\.json but no map/clipmap\.safetensors"):
        ClipMapCompressor.from_pretrained(folder)


def drop(tensors: dict[str, torch.Tensor]) -> str:
    del tensors["operators.text_ffn.delta"]
    return "operators.text_ffn.delta"


def add(tensors: dict[str, torch.Tensor]) -> str:
    tensors["operators.embed.delta"] = torch.zeros(2, 2)
    return "operators.embed.delta"


def reshape(tensors: dict[str, torch.Tensor]) -> str:
    tensors["operators.vision_residual.initial"] = torch.zeros(32, 63)
    return "operators.vision_residual.initial"


@pytest.mark.parametrize("tamper", [drop, add, reshape], ids=["missing", "unknown", "another shape"])
def test_map_weights_that_do_not_fit_are_an_error_that_names_them(folder, tamper):
    path = folder / "map" / "clipmap.safetensors"
    tensors = load_file(path)
    name = tamper(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"does not fit the map's config.*\['{name}'\]"):
        ClipMapCompressor.from_pretrained(folder)


def test_a_map_that_is_not_finite_is_an_error_that_names_its_tensor(folder):
    path = folder / "map" / "clipmap.safetensors"
    tensors = load_file(path)
    tensors["operators.text_ffn.delta"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"not finite.*'operators\.text_ffn\.delta'"):
        ClipMapCompressor.from_pretrained(folder)


def rewrite(folder: Path, change) -> None:
    path = folder / "map" / "clipmap_config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_map_config_with_an_unknown_key_is_an_error(folder):
    rewrite(folder, lambda content: content.update(student="small"))
    with pytest.raises(ValueError, match=r"must have the keys .*'map', 'teacher', 'teacher_revision'.*'student'"):
        ClipMapCompressor.from_pretrained(folder)


def test_a_map_config_without_a_teacher_is_an_error(folder):
    rewrite(folder, lambda content: content.pop("teacher"))
    with pytest.raises(ValueError, match="must have the keys"):
        ClipMapCompressor.from_pretrained(folder)


def test_an_unknown_key_of_the_mapping_is_an_error(folder):
    rewrite(folder, lambda content: content["map"].update(width=32))
    with pytest.raises(ValueError, match=r"Unknown keys \['width'\] for ClipMapConfig"):
        ClipMapCompressor.from_pretrained(folder)


def test_a_map_whose_teacher_is_gone_is_an_error_that_names_it(folder):
    rewrite(folder, lambda content: content.update(teacher="/gone/teacher"))
    with pytest.raises(OSError, match="/gone/teacher"):
        ClipMapCompressor.from_pretrained(folder)


def test_a_relative_teacher_is_found_from_elsewhere(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher_folder.parent)
    ClipMapCompressor.from_pretrained(teacher_folder.name, student=SMALL).save_pretrained(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert ClipMapCompressor.from_pretrained("out").teacher_id == str(teacher_folder)


# The Hub, played by stand-ins


def http_error(cls: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return cls(f"{status} from the Hub", response=Mock(status_code=status, headers={}))


@pytest.fixture
def hub_answers(monkeypatch):
    """Lets every download of a map's file end in the given exception."""

    def answer(error: Exception) -> None:
        monkeypatch.setattr(clipmap_hf.hub.map_folder, "hf_hub_download", Mock(side_effect=error))

    return answer


def test_a_hub_repository_without_map_is_an_error_that_says_what_to_give(hub_answers):
    hub_answers(http_error(RemoteEntryNotFoundError, 404))
    with pytest.raises(ValueError, match=r"'me/clip' holds no map/clipmap_config\.json.*student="):
        ClipMapCompressor.from_pretrained("me/clip")


def test_a_hub_that_cannot_be_reached_is_not_an_absent_map(hub_answers):
    hub_answers(LocalEntryNotFoundError("no connection"))
    with pytest.raises(OSError, match="'me/clip' is not cached, and the Hub cannot be reached"):
        ClipMapCompressor.from_pretrained("me/clip")


@pytest.mark.parametrize(("cls", "status"), [(HfHubHTTPError, 500), (RepositoryNotFoundError, 401)])
def test_a_hub_that_refuses_is_not_an_absent_map(hub_answers, cls, status):
    hub_answers(http_error(cls, status))
    with pytest.raises(cls, match=f"{status} from the Hub"):
        ClipMapCompressor.from_pretrained("me/clip")


def test_a_map_on_the_hub_is_read_at_its_revision(shared_compressor, saved_folder, monkeypatch):
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs))
        return str(saved_folder / filename)

    monkeypatch.setattr(clipmap_hf.hub.map_folder, "hf_hub_download", download)
    loaded = ClipMapCompressor.from_pretrained("me/clip", revision="v1", token=False)
    assert_same(loaded.export(), shared_compressor.export())
    options = {"revision": "v1", "token": False}
    assert asked == [("me/clip", f"map/{name}", options) for name in ("clipmap_config.json", "clipmap.safetensors")]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Takes what is pushed: the folder lands in `tmp_path/hub/<repo>`, the calls' arguments in the returned list."""
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create_repo", {"repo_id": repo_id, "api_token": self.token, **kwargs}))
        return Mock(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        calls.append(("upload_folder", {"repo_id": repo_id, **kwargs}))
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return f"commit to {repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    branches = lambda self, repo_id, **kwargs: calls.append(("create_branch", {"repo_id": repo_id, **kwargs}))  # noqa: E731
    monkeypatch.setattr(HfApi, "create_branch", branches)
    return calls


def test_a_pushed_student_is_loaded_by_plain_transformers(shared_compressor, hub, tmp_path, saved_folder):
    assert shared_compressor.push_to_hub("clip-small") == "commit to me/clip-small"
    pushed = tmp_path / "hub" / "me" / "clip-small"
    assert_same(CLIPModel.from_pretrained(pushed), shared_compressor.export())
    assert {p.name for p in pushed.iterdir()} == {p.name for p in saved_folder.iterdir()} - {"map"}


def test_a_map_of_a_hub_teacher_is_pushed_when_asked(shared_compressor, hub, tmp_path, monkeypatch, teacher_folder):
    monkeypatch.setattr(shared_compressor, "teacher_id", "openai/clip")
    shared_compressor.push_to_hub("clip-small", include_map=True)
    pushed = tmp_path / "hub" / "me" / "clip-small"
    assert {path.name for path in (pushed / "map").iterdir()} == MAP_FILES
    content = json.loads((pushed / "map" / "clipmap_config.json").read_text())
    assert content["teacher"] == "openai/clip"
    content["teacher"] = str(teacher_folder)  # what the Hub would give for that id
    (pushed / "map" / "clipmap_config.json").write_text(json.dumps(content))
    assert_same(ClipMapCompressor.from_pretrained(pushed).export(), shared_compressor.export())


def test_a_map_of_a_local_teacher_is_not_pushed(shared_compressor, hub):
    with pytest.raises(ValueError, match="local folder"):
        shared_compressor.push_to_hub("clip-small", include_map=True)
    assert not hub


def test_a_push_without_map_deletes_the_map_of_other_weights(shared_compressor, hub):
    shared_compressor.push_to_hub("clip-small")
    assert "map/*" in hub[-1][1]["delete_patterns"]


def test_saving_without_map_removes_the_map_of_other_weights(shared_compressor, tmp_path):
    shared_compressor.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "map").exists()
    shared_compressor.save_pretrained(tmp_path / "out", include_map=False)
    assert not (tmp_path / "out" / "map").exists()


def test_the_teachers_folder_is_never_overwritten(shared_compressor, teacher_folder):
    with pytest.raises(ValueError, match="holds the teacher"):
        shared_compressor.save_pretrained(teacher_folder)


def test_a_student_is_saved_though_its_teachers_folder_is_gone(teacher_folder, tmp_path, tiny_batch):
    teacher = shutil.copytree(teacher_folder, tmp_path / "gone")
    compressor = ClipMapCompressor.from_pretrained(teacher, SMALL)
    shutil.rmtree(teacher)
    compressor.save_pretrained(tmp_path / "out")
    student = CLIPModel.from_pretrained(tmp_path / "out").state_dict()
    torch.testing.assert_close(student, compressor.export().state_dict(), atol=0, rtol=0)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "was not at hand" in card.text and str(tmp_path) not in card.text


def test_a_card_that_cannot_be_written_costs_neither_student_nor_map(shared_compressor, tmp_path, teacher_folder):
    folder = tmp_path / "out"
    shared_compressor.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"other weights")
    with pytest.raises(yaml.YAMLError):
        shared_compressor.save_pretrained(folder, recipe="losses: [affinity")
    assert {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")} == before
    assert not (folder / "README.md").exists()  # the one that was there is of other weights


def test_a_map_whose_teacher_has_moved_says_so(saved_folder, tmp_path):
    folder = shutil.copytree(saved_folder, tmp_path / "out")
    path = folder / "map" / "clipmap_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": str(tmp_path / "gone")}))
    with pytest.raises(OSError, match="gone.*If it has moved, correct `teacher`"):
        ClipMapCompressor.from_pretrained(folder)


def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(OSError, match="There is no file or folder"):
        ClipMapCompressor.from_pretrained(tmp_path / "nothing", student="tiny")


def test_arguments_of_a_push_reach_the_hub(shared_compressor, hub):
    shared_compressor.push_to_hub(
        "clip-small", private=True, revision="v2", create_pr=True, commit_message="Smaller", token="hf_secret"
    )
    (_, created), (_, branch), (_, uploaded) = hub
    assert branch["branch"] == "v2" and branch["exist_ok"] is True
    assert created["private"] is True and created["exist_ok"] is True and created["api_token"] == "hf_secret"
    assert uploaded["repo_id"] == "me/clip-small"
    assert (uploaded["revision"], uploaded["create_pr"], uploaded["commit_message"]) == ("v2", True, "Smaller")


def test_a_card_names_a_local_teacher_without_its_path(saved_folder, teacher_folder):
    text = (saved_folder / "README.md").read_text()
    assert str(teacher_folder) not in text and teacher_folder.name in text
    assert ModelCard.load(saved_folder / "README.md").data.base_model is None


# What a model of transformers has too


def test_features_are_the_students(shared_compressor, tiny_batch):
    student = shared_compressor.export()
    texts = {name: tiny_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for ours, theirs in (
            (shared_compressor.get_image_features, student.get_image_features),
            (shared_compressor.mapper.get_image_features, student.get_image_features),
        ):
            given, wanted = (call(pixel_values=tiny_batch["pixel_values"]).pooler_output for call in (ours, theirs))
            torch.testing.assert_close(given, wanted, atol=0, rtol=0)
        given, wanted = shared_compressor.get_text_features(**texts), student.get_text_features(**texts)
        torch.testing.assert_close(given.pooler_output, wanted.pooler_output, atol=0, rtol=0)


def test_it_prints_in_a_line(shared_compressor, teacher_folder):
    text = repr(shared_compressor)
    assert text == f"ClipMapCompressor('{teacher_folder}', diagonal, vision 64 × 4 → 32 × 2, text 48 × 3 → 32 × 2)"


def test_its_config_is_the_students(shared_compressor):
    assert shared_compressor.config is shared_compressor.mapper.config
    assert shared_compressor.config.vision_config.hidden_size == 32


@pytest.mark.parametrize("part", ["compressor", "mapper"])
def test_the_trainer_of_transformers_trains_it(teacher_folder, tiny_pairs, tiny_processor, tmp_path, part):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, SMALL)
    model = compressor if part == "compressor" else compressor.mapper
    before = copy.deepcopy(compressor.mapper.operators.state_dict())
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
    )

    def collate(rows):
        texts, images = [row["caption"] for row in rows], [row["image"] for row in rows]
        batch = tiny_processor(text=texts, images=images, padding=True, return_tensors="pt")
        return {**batch, "return_loss": True}

    Trainer(model, arguments, data_collator=collate, train_dataset=tiny_pairs).train()
    after = compressor.mapper.operators.state_dict()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved and all(name.endswith("delta") for name in moved)


def test_weights_are_saved_in_the_dtype_asked_for(shared_compressor, tmp_path):
    shared_compressor.save_pretrained(tmp_path, include_map=False, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert CLIPModel.from_pretrained(tmp_path).dtype == torch.float16


def test_a_student_too_large_for_its_dtype_is_not_written_over_a_good_one(shared_compressor, tmp_path):
    shared_compressor.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    compressor = copy.deepcopy(shared_compressor)
    compressor.mapper.operators["vision_ffn"].delta.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"student.*not finite.*fc1.*torch\.float16"):
        compressor.save_pretrained(tmp_path, dtype=torch.float16)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["device", "device_map"])
def test_it_lies_where_it_was_told(teacher_folder, name):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, SMALL, **{name: "meta"})
    assert {parameter.device.type for parameter in compressor.parameters()} == {"meta"}


@pytest.mark.parametrize(("name", "words"), [("studnet", "Did you mean 'student'"), ("trust", "Downloads take")])
def test_a_misspelt_argument_is_refused_by_its_own_name(teacher_folder, name, words):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'. {words}"):
        ClipMapCompressor.from_pretrained(teacher_folder, SMALL, **{name: 1})


# Data


def test_columns_are_taken_by_name(teacher_folder, pairs_parquet):
    rows = load_pairs(str(pairs_parquet)).rename_columns({"image": "picture", "caption": "alt"})
    given = {"calibration_data": rows, "calibration_pairs": 8, "image_column": "picture", "caption_column": "alt"}
    expected = ClipMapCompressor.from_pretrained(
        teacher_folder, OPEN, calibration_data=pairs_parquet, calibration_pairs=8
    )
    assert_same(ClipMapCompressor.from_pretrained(teacher_folder, OPEN, **given).export(), expected.export())


def test_captions_are_not_replaced_by_random_texts_unless_that_is_asked_for(teacher_folder, pairs_parquet):
    rows = load_pairs(str(pairs_parquet)).rename_column("caption", "alt")
    with pytest.raises(ValueError, match=r"no column 'caption'; it has \['image', 'alt'\]. .*caption_column=None"):
        ClipMapCompressor.from_pretrained(teacher_folder, OPEN, calibration_data=rows)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (
            DatasetDict(train=Dataset.from_dict({}), test=Dataset.from_dict({})),
            ValueError,
            r"splits \['test', 'train'\]",
        ),
        ({"image": []}, TypeError, "Data of the type dict cannot be read. Give a path"),
        (7, TypeError, "Calibration data of the type int cannot be read. Give pairs"),
    ],
)
def test_data_that_cannot_be_read_is_refused_with_what_can(teacher_folder, data, error, words):
    with pytest.raises(error, match=words):
        ClipMapCompressor.from_pretrained(teacher_folder, OPEN, calibration_data=data)


# A teacher that is held already


def test_a_model_is_a_teacher_and_stays_as_it_is(teacher_folder, tmp_path):
    model = CLIPModel.from_pretrained(teacher_folder).train()
    before = copy.deepcopy(model.state_dict())
    given = ClipMapCompressor.from_pretrained(model, student=SMALL)
    loaded = ClipMapCompressor.from_pretrained(teacher_folder, student=SMALL)
    assert given.teacher_id == loaded.teacher_id and given.processor.tokenizer.get_vocab()
    torch.testing.assert_close(given.export().state_dict(), loaded.export().state_dict(), atol=0, rtol=0)
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    given.save_pretrained(tmp_path)
    again = ClipMapCompressor.from_pretrained(tmp_path)
    torch.testing.assert_close(again.export().state_dict(), given.export().state_dict(), atol=0, rtol=0)


def test_a_model_is_calibrated_with_the_processor_given(teacher_folder, tiny_processor, tiny_pairs):
    model = CLIPModel.from_pretrained(teacher_folder)
    pairs = [(row["image"], row["caption"]) for row in tiny_pairs]
    given = ClipMapCompressor.from_pretrained(
        model, SMALL_CALIBRATED, processor=tiny_processor, calibration_data=pairs
    )
    loaded = ClipMapCompressor.from_pretrained(teacher_folder, SMALL_CALIBRATED, calibration_data=pairs)
    assert given.processor is tiny_processor
    torch.testing.assert_close(given.export().state_dict(), loaded.export().state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"source": torch.nn.Linear(1, 1)}, TypeError, "type Linear cannot be taken; give a Hub id, a folder or a"),
        (
            {"source": "model", "student": None},
            ValueError,
            "A map has its own teacher and processor; .* give the student",
        ),
        ({"source": "model", "revision": "v1"}, ValueError, "has no revision to choose; leave it out"),
        ({"source": "folder", "processor": "x"}, ValueError, "of a Hub id or folder lies there; leave processor out"),
        (
            {"source": "nameless"},
            ValueError,
            "has no name_or_path, .* Save it with its processor, and give the folder",
        ),
    ],
)
def test_a_teacher_that_cannot_be_taken_is_refused(teacher_folder, shared_teacher, values, error, words):
    nameless = CLIPModel(shared_teacher.config)
    nameless.name_or_path = ""
    sources = {"model": CLIPModel.from_pretrained(teacher_folder), "folder": teacher_folder, "nameless": nameless}
    source = values["source"] if isinstance(values["source"], torch.nn.Module) else sources[values["source"]]
    rest = {"student": SMALL, **{name: value for name, value in values.items() if name != "source"}}
    with pytest.raises(error, match=words):
        ClipMapCompressor.from_pretrained(source, **rest)
