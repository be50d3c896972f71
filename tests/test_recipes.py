"""Recipes as a user starts them: each in a process of its own, on tiny data, for two steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from set_folders import rows_for, write_set
from transformers import CLIPModel, CLIPProcessor

import clipmap_hf
from clipmap_hf import ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.further_texts import further_texts
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.sets import EVAL_SETS
from clipmap_hf.models.loading import load_processor
from clipmap_hf.ternary.model import sparsity


REPOSITORY = Path(clipmap_hf.__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
SMALL = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16)
RECALLS = {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} | {"mean_recall"}
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "arguments.yaml", "metrics.jsonl"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a recipe's process."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets")),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="module")
def start(environment):
    """A function that runs a recipe to its end: `start("map.py", "--teacher", …)`."""

    def run(recipe: str, *argv, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command = [sys.executable, *launcher, str(RECIPES / recipe), *map(str, argv)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="module")
def finish(start):
    """`start`, but a recipe that fails fails the test, and shows why."""

    def run(*argv, **kwargs) -> str:
        result = start(*argv, **kwargs)
        assert result.returncode == 0, result.stderr[-5000:]
        return result.stdout

    return run


@pytest.fixture(scope="module")
def steps():
    """A function that gives the options for two steps of eight pairs, of each named stage."""

    def options(*stages: str) -> list:
        prefixes = [f"--{stage}_" for stage in stages] or ["--"]
        return [value for prefix in prefixes for value in (f"{prefix}steps", 2, f"{prefix}batch_size", 8)] + [
            "--log_every",
            1,
        ]

    return options


@pytest.fixture(scope="module")
def mapped_folder(finish, steps, teacher_folder, pairs_parquet, tmp_path_factory) -> Path:
    """What `map.py` makes of the tiny teacher."""
    folder = tmp_path_factory.mktemp("map") / "mapped"
    data = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet, "--eval_every", 1)
    table = finish("map.py", "--teacher", teacher_folder, *SMALL, *data, *steps("mapping"), "--output_dir", folder)
    assert "| teacher" in table and "| student" in table
    return folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_student(folder: Path, vision_width: int) -> CLIPModel:
    """The files are there, and plain transformers loads the model and its processor."""
    assert MODEL_FILES - {"arguments.yaml", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vision_config.hidden_size == vision_width
    processor = CLIPProcessor.from_pretrained(folder, backend="pil")
    assert processor(text=["red circle"])["input_ids"][0][0] == model.config.text_config.bos_token_id
    return model


# Whole runs


@pytest.mark.recipes
def test_pretrain_makes_a_new_model_and_can_be_repeated(finish, steps, pairs_parquet, tmp_path):
    sizes = "--image_size 32 --patch_size 16 --head_width 16 --vision_hidden_size 32 --vision_num_hidden_layers 1 "
    sizes += (
        "--text_hidden_size 16 --text_num_hidden_layers 1 --projection_dim 16 --vocab_size 530 --context_length 12"
    )
    data = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet)
    captions = ("--keyword_column", "keywords", "--caption_sampling", "random")
    first, again = tmp_path / "teacher", tmp_path / "again"
    finish("pretrain.py", *data, *captions, *sizes.split(), *steps(), "--output_dir", first)
    assert {path.name for path in first.iterdir()} >= MODEL_FILES
    model = check_student(first, vision_width=32)
    assert model.config.text_config.vocab_size <= 530
    assert [line["step"] for line in log_of(first) if "loss" in line] == [1, 2]
    assert {f"eval_{name}" for name in RECALLS} <= log_of(first)[-1].keys()

    finish("pretrain.py", "--config", first / "arguments.yaml", "--output_dir", again)
    weights = load_file(again / "model.safetensors")
    for name, tensor in load_file(first / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, atol=0, rtol=0)


@pytest.mark.recipes
def test_pretrain_takes_the_shape_of_another_model(finish, steps, teacher_folder, pairs_parquet, tmp_path):
    data = ("--config_from", teacher_folder, "--train_data", pairs_parquet)
    finish("pretrain.py", *data, *steps(), "--output_dir", tmp_path)
    model, teacher = check_student(tmp_path, vision_width=64), CLIPModel.from_pretrained(teacher_folder)
    shapes = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert not torch.equal(model.visual_projection.weight, teacher.visual_projection.weight)  # from scratch


@pytest.mark.recipes
def test_map_writes_a_student_with_its_map(mapped_folder):
    assert {path.name for path in mapped_folder.iterdir()} >= MODEL_FILES | {"README.md", "map", "best"}
    check_student(mapped_folder, vision_width=32)
    check_student(mapped_folder / "best", vision_width=32)
    tensors = load_file(mapped_folder / "map" / "clipmap.safetensors")
    moved = [name for name, tensor in tensors.items() if name.endswith("delta") and tensor.any()]
    assert moved and not [name for name in tensors if "teacher" in name]
    arguments = yaml.safe_load((mapped_folder / "arguments.yaml").read_text())
    assert arguments["vision_hidden_size"] == 32 and arguments["mapping"]["max_steps"] == 2
    assert [line["step"] for line in log_of(mapped_folder) if "eval_mean_recall" in line] == [1, 2]


@pytest.mark.recipes
def test_map_goes_on_from_its_own_output(finish, steps, mapped_folder, pairs_parquet, teacher_folder, tmp_path):
    data = ("--teacher", mapped_folder, "--train_data", pairs_parquet)
    finish("map.py", *data, *steps("mapping"), "--output_dir", tmp_path)
    check_student(tmp_path, vision_width=32)
    before, after = (load_file(folder / "map" / "clipmap.safetensors") for folder in (mapped_folder, tmp_path))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (not name.endswith("delta")), name
    for name in ("teacher", "map"):
        configs = [json.loads((f / "map" / "clipmap_config.json").read_text()) for f in (mapped_folder, tmp_path)]
        assert configs[0][name] == configs[1][name]
    assert configs[0]["teacher"] == str(teacher_folder)


@pytest.mark.recipes
def test_map_reads_a_webdataset(finish, steps, teacher_folder, pairs_tar, tmp_path):
    data = ("--train_data", pairs_tar, "--image_column", "png", "--caption_column", "txt")
    finish("map.py", "--teacher", teacher_folder, *SMALL, *data, *steps("mapping"), "--output_dir", tmp_path)
    check_student(tmp_path, vision_width=32)
    assert log_of(tmp_path)[-1]["pairs"] == 16 and log_of(tmp_path)[-1]["bad_rows"] == {}


@pytest.mark.recipes
def test_distill_trains_a_mapped_student(finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path):
    models = ("--student_model", mapped_folder, "--teacher", teacher_folder)
    data = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet)
    finish("distill.py", *models, *data, *steps("distillation"), "--output_dir", tmp_path)
    student, before = check_student(tmp_path, vision_width=32), CLIPModel.from_pretrained(mapped_folder)
    assert not torch.equal(student.visual_projection.weight, before.visual_projection.weight)
    assert not (tmp_path / "map").exists()
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        "| teacher |" in card.text and "| student |" in card.text and "distillation:\n  num_train_epochs:" in card.text
    )
    assert {"affinity"} <= log_of(tmp_path)[0].keys()


@pytest.mark.recipes
def test_a_cache_made_beforehand_distills_like_the_live_teacher(
    finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path
):
    shared = ("--teacher", teacher_folder, "--train_data", pairs_parquet, "--crop_scale", 0.4, 1.0)
    cache = ("--teacher_cache", tmp_path / "cache", "--views", 2)
    printed = finish("cache.py", *shared, *cache, "--seed", 3, "--num_workers", 1)
    assert "2 views of each image" in printed
    files = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    distill = ("distill.py", *shared, "--student_model", mapped_folder, "--seed", 3, *steps("distillation"))
    losses = {}
    for name, options in (("live", ()), ("cached", cache)):
        finish(*distill, *options, "--distillation_steps", 6, "--output_dir", tmp_path / name)
        losses[name] = [line["loss"] for line in log_of(tmp_path / name)]
    assert len(losses["live"]) == 6 and losses["cached"] == pytest.approx(losses["live"], rel=1e-3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == files
    check_student(tmp_path / "cached", vision_width=32)


@pytest.mark.recipes
def test_a_cache_without_a_folder_is_an_error_that_names_the_option(start):
    result = start("cache.py", "--teacher", "clip", "--train_data", "pairs.parquet")
    assert result.returncode != 0 and "--teacher_cache FOLDER" in result.stderr


@pytest.mark.recipes
def test_distill_takes_several_teachers_and_keeps_their_embeddings(
    finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path
):
    models = ("--student_model", mapped_folder, "--teacher", teacher_folder, mapped_folder)
    cache = ("--teacher_cache", tmp_path / "cache", "--views", 1)
    argv = (*models, "--train_data", pairs_parquet, *cache, *steps("distillation"))
    finish("distill.py", *argv, "--output_dir", tmp_path / "out")
    check_student(tmp_path / "out", vision_width=32)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())["manifest"]
    assert [one["id"] for one in manifest["teachers"]] == [teacher_folder.name, mapped_folder.name]
    assert "the teacher and `mapped`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.recipes
def test_streams_are_mapped_and_distilled_in_micro_batches(finish, steps, teacher_folder, pairs_tars, tmp_path):
    data = ("--train_data", pairs_tars, "--streaming", "true", "--shuffle_buffer", 5, "--num_workers", 2)
    columns = ("--image_column", "png", "--caption_column", "txt")
    micro = ("--mapping_micro_batch_size", 4, "--distillation_micro_batch_size", 2)
    argv = ("--teacher", teacher_folder, *SMALL, *data, *columns, *micro, *steps("mapping", "distillation"))
    finish("compress.py", *argv, "--output_dir", tmp_path)
    check_student(tmp_path, vision_width=32)
    for folder in (tmp_path / "mapped", tmp_path):
        assert [line["pairs"] for line in log_of(folder)] == [8, 16]
    arguments = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    assert arguments["streaming"] is True and arguments["mapping"]["micro_batch_size"] == 4


@pytest.mark.recipes
def test_micro_batches_map_like_whole_batches(finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path):
    data = ("--train_data", pairs_parquet, "--mapping_micro_batch_size", 2)
    finish("map.py", "--teacher", teacher_folder, *SMALL, *data, *steps("mapping"), "--output_dir", tmp_path)
    losses = [[line["loss"] for line in log_of(one) if "loss" in line] for one in (mapped_folder, tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.recipes
def test_a_mapping_can_be_distilled(finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path):
    data = ("--train_data", pairs_parquet, "--mapping_losses", "affinity=1", "contrastive=0")
    finish("map.py", "--teacher", teacher_folder, *SMALL, *data, *steps("mapping"), "--output_dir", tmp_path)
    lines, others = ([line for line in log_of(one) if "loss" in line] for one in (tmp_path, mapped_folder))
    assert [line["loss"] for line in lines] == [line["affinity"] for line in lines]
    assert lines[0]["contrastive"] == pytest.approx(others[0]["loss"], rel=1e-4)  # the same start
    check_student(tmp_path, vision_width=32)


@pytest.mark.recipes
def test_ternarize_trains_and_packs_a_teacher_or_a_student(
    finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path
):
    shared = ("ternarize.py", "--teacher", teacher_folder, "--train_data", pairs_parquet, *steps("ternary"))
    cache = ("--teacher_cache", tmp_path / "cache", "--views", 1)
    finish(*shared, *cache, "--ternary_quantizer", "twn", "--output_dir", tmp_path / "teacher")
    finish(*shared, *cache, "--student_model", mapped_folder, "--output_dir", tmp_path / "student")
    for name, width in (("teacher", 64), ("student", 32)):
        model = CLIPModel.from_pretrained(tmp_path / name)
        assert model.config.vision_config.hidden_size == width and sparsity(model) > 0.1
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert config["quantizer"] == ("twn" if name == "teacher" else "learned")


@pytest.mark.recipes
def test_mask_learns_masks_and_writes_what_they_select(finish, steps, teacher_folder, pairs_parquet, tmp_path):
    data = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet, "--depth", "score")
    argv = ("--teacher", teacher_folder, *SMALL, *data, *steps("masking"), "--output_dir", tmp_path)
    finish("mask.py", *argv, "--masking_ramp_steps", 2, "--masking_losses", "affinity=1", "feature=10")
    check_student(tmp_path, vision_width=32)
    lines = [line for line in log_of(tmp_path) if "loss" in line]
    assert {"affinity", "feature", "budget", "share", "due"} <= lines[0].keys() and len(lines) == 2
    assert lines[1]["due"] < lines[0]["due"] < 1
    assert f"eval_{next(iter(RECALLS))}" in log_of(tmp_path)[-1]
    assert "learned masks (TinyCLIP)" in (tmp_path / "README.md").read_text()


@pytest.mark.recipes
def test_mope_writes_a_table_and_prints_a_heat_map(finish, teacher_folder, pairs_parquet, tmp_path):
    pairs = ("--train_data", pairs_parquet, "--calibration_pairs", 16)
    printed = finish("mope.py", "--teacher", teacher_folder, *pairs, "--output_dir", tmp_path)
    errors = json.loads((tmp_path / "pruning_errors.json").read_text())
    assert {tower: [len(part) for part in one.values()] for tower, one in errors.items()} == {
        "vision": [4, 4, 4],
        "text": [3, 3, 3],
    }
    assert printed.splitlines()[0] == "vision" and printed.splitlines()[2].split()[0] == "0"


@pytest.mark.recipes
def test_compress_distills_what_masks_select(finish, steps, teacher_folder, pairs_parquet, tmp_path):
    argv = ("--teacher", teacher_folder, *SMALL, "--train_data", pairs_parquet, "--output_dir", tmp_path)
    finish("compress.py", *argv, *steps("masking", "distillation"))
    selected, student = check_student(tmp_path / "masked", 32), check_student(tmp_path, 32)
    assert not torch.equal(selected.text_projection.weight, student.text_projection.weight)
    assert not (tmp_path / "mapped").exists()
    assert f"A smaller version of `{teacher_folder.name}`" in (tmp_path / "README.md").read_text()


SIZES = ("vision_hidden_size=48,text_hidden_size=32", "vision_hidden_size=32,vision_num_hidden_layers=2")


@pytest.mark.recipes
def test_progressive_goes_from_size_to_size_and_on_where_it_was(
    finish, steps, teacher_folder, pairs_parquet, tmp_path
):
    argv = ("--teacher", teacher_folder, "--train_data", pairs_parquet, "--initializer", "magnitude")
    argv += (*steps("distillation"), "--teacher_cache", tmp_path / "cache", "--views", 1, "--sizes", *SIZES)
    finish("progressive.py", *argv, "--output_dir", tmp_path / "whole")
    first, last = check_student(tmp_path / "whole" / "1", 48), check_student(tmp_path / "whole", 32)
    assert first.config.text_config.hidden_size == last.config.text_config.hidden_size == 32
    assert last.config.vision_config.num_hidden_layers == 2 < first.config.vision_config.num_hidden_layers
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"1", "2"}
    for folder in ("1", "."):  # the original teacher throughout
        assert (
            f"A smaller version of `{teacher_folder.name}`" in (tmp_path / "whole" / folder / "README.md").read_text()
        )
    shutil.copytree(tmp_path / "whole" / "1", tmp_path / "stopped" / "1")
    written = (tmp_path / "stopped" / "1" / "checkpoints").stat().st_mtime
    finish("progressive.py", *argv, "--output_dir", tmp_path / "stopped")
    assert (tmp_path / "stopped" / "1" / "checkpoints").stat().st_mtime == written  # no step was made again
    for folder in ("1", "."):
        weights = [(tmp_path / run / folder / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
        assert weights[0] == weights[1]


@pytest.mark.recipes
def test_progressive_reads_sizes_from_yaml(finish, teacher_folder, pairs_parquet, tmp_path):
    stage = {"steps": 1, "batch_size": 8}
    sizes = [{"vision_hidden_size": 48, "text_hidden_size": 32}, {"text_num_hidden_layers": 1, "depth": "score"}]
    content = {"sizes": sizes, "teacher": str(teacher_folder), "masking": stage, "distillation": stage}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    argv = ("--train_data", pairs_parquet, "--output_dir", tmp_path / "out")
    finish("progressive.py", "--config", tmp_path / "two.yaml", *argv)
    assert check_student(tmp_path / "out" / "1" / "masked", 48).config.text_config.num_hidden_layers > 1
    assert check_student(tmp_path / "out", 48).config.text_config.num_hidden_layers == 1


@pytest.mark.recipes
def test_a_terminated_recipe_exits_with_75_and_the_same_command_finishes_it(
    finish, environment, teacher_folder, pairs_parquet, tmp_path
):
    numbers = ("--mapping_steps", 60, "--mapping_batch_size", 8, "--mapping_micro_batch_size", 4, "--log_every", 1)
    argv = ("map.py", "--teacher", teacher_folder, *SMALL, "--train_data", pairs_parquet, *numbers)
    finish(*argv, "--output_dir", tmp_path / "whole")
    command = [sys.executable, str(RECIPES / argv[0]), *map(str, argv[1:]), "--output_dir", str(tmp_path / "out")]
    log = tmp_path / "out" / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 75 and "Stopped by SIGTERM" in errors
    assert 5 <= len(log_of(tmp_path / "out")) < 60 and not (tmp_path / "out" / "model.safetensors").exists()
    finish(*argv, "--output_dir", tmp_path / "out")
    for name in ("model.safetensors", "map/clipmap.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [[line | {"seconds": 0} for line in log_of(tmp_path / name)] for name in ("whole", "out")]
    assert lines[0] == lines[1] and len(lines[0]) == 60


@pytest.mark.recipes
def test_compress_does_all_of_it_under_accelerate(finish, steps, teacher_folder, pairs_parquet, tmp_path):
    data = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet)
    launcher = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no"
    printed = finish(
        "compress.py",
        *("--teacher", teacher_folder, *SMALL, *data, *steps("mapping", "distillation"), "--output_dir", tmp_path),
        launcher=(*launcher.split(), "--dynamo_backend", "no"),
    )
    check_student(tmp_path, vision_width=32)
    check_student(tmp_path / "mapped", vision_width=32)
    assert (tmp_path / "mapped" / "map").is_dir() and not (tmp_path / "map").exists()
    summary = printed[printed.index("The result is in") :].splitlines()  # the progress bar's lines stand before it
    assert {line.split(":")[0] for line in summary if "recall" in line} == RECALLS
    assert [line["stage"] for line in log_of(tmp_path / "mapped")][0] == "mapping"
    assert [line["stage"] for line in log_of(tmp_path)][0] == "distillation"
    arguments = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    assert arguments["mapping"]["max_steps"] == arguments["distillation"]["max_steps"] == 2


@pytest.mark.recipes
def test_compress_goes_on_with_a_map_and_distills_from_the_maps_teacher(
    finish, steps, mapped_folder, teacher_folder, pairs_parquet, tmp_path
):
    data = ("--train_data", pairs_parquet, "--output_dir", tmp_path)
    finish("compress.py", "--teacher", mapped_folder, *data, *steps("mapping", "distillation"))
    check_student(tmp_path, vision_width=32)
    assert f"A smaller version of `{teacher_folder.name}`" in (tmp_path / "README.md").read_text()
    saved = json.loads((tmp_path / "mapped" / "map" / "clipmap_config.json").read_text())
    assert saved["teacher"] == str(teacher_folder)


@pytest.mark.recipes
def test_compress_without_mapping_distills_from_the_inheritance(
    finish, steps, teacher_folder, pairs_parquet, tmp_path
):
    argv = ("--teacher", teacher_folder, *SMALL, "--train_data", pairs_parquet, "--output_dir", tmp_path)
    rate = ("--distillation_learning_rate", 0)  # leaves the student as it starts
    finish("compress.py", *argv, *steps("distillation"), *rate, "--mapping_steps", 0, "--initializer", "diagonal")
    name, teacher = "text_projection.weight", load_file(teacher_folder / "model.safetensors")
    student = check_student(tmp_path, 32).state_dict()
    torch.testing.assert_close(student[name], teacher[name][:, :16], atol=0, rtol=0)
    assert not (tmp_path / "mapped").exists()


@pytest.mark.recipes
def test_compress_without_steps_writes_the_calibrated_start(finish, teacher_folder, pairs_parquet, tmp_path):
    argv = ("--teacher", teacher_folder, *SMALL, "--train_data", pairs_parquet, "--calibration_pairs", 16, "--seed", 3)
    none = ("--mapping_steps", 0, "--distillation_steps", 0, "--mapping_batch_size", 8, "--distillation_batch_size", 8)
    finish("compress.py", *argv, *none, "--output_dir", tmp_path)
    sizes = {"vision": TowerConfig(32, num_hidden_layers=2), "text": TowerConfig(16)}
    rows, processor = load_pairs(str(pairs_parquet)), load_processor(str(teacher_folder), backend="pil")
    more = further_texts(rows, PairCollator(processor.tokenizer, processor.image_processor), 48, seed=3)
    pairs = CalibrationPairs(rows, processor, 16, seed=3, more_texts=more)
    expected = ClipMapCompressor.from_pretrained(
        teacher_folder, ClipMapConfig(**sizes, seed=3), calibration_data=pairs
    ).export()
    weights = load_file(tmp_path / "model.safetensors")
    for name, tensor in expected.state_dict().items():
        if name != "logit_scale":  # a stage's own
            torch.testing.assert_close(weights[name], tensor, atol=0, rtol=0)
    assert not {"mapped", "start", "checkpoints"} & {path.name for path in tmp_path.iterdir()}
    assert yaml.safe_load((tmp_path / "arguments.yaml").read_text())["calibration_pairs"] == 16


@pytest.mark.recipes
def test_map_starts_from_the_diagonal_without_calibration(finish, steps, teacher_folder, pairs_parquet, tmp_path):
    data = ("--train_data", pairs_parquet, "--initializer", "diagonal")
    numbers = (*steps("mapping"), "--mapping_learning_rate", 0)
    finish("map.py", "--teacher", teacher_folder, *SMALL, *data, *numbers, "--output_dir", tmp_path)
    teacher = load_file(teacher_folder / "model.safetensors")
    name = "visual_projection.weight"
    assert torch.equal(check_student(tmp_path, vision_width=32).state_dict()[name], teacher[name][:, :32])
    assert not (tmp_path / "start").exists()
    assert not [one for one in load_file(tmp_path / "map" / "clipmap.safetensors") if "correction" in one]


@pytest.mark.recipes
def test_a_finished_command_is_repeated_without_another_start(finish, steps, teacher_folder, pairs_parquet, tmp_path):
    argv = ("map.py", "--teacher", teacher_folder, *SMALL, "--train_data", pairs_parquet, *steps("mapping"))
    finish(*argv, "--output_dir", tmp_path)
    assert not (tmp_path / "start").exists()
    before = [(tmp_path / name).read_bytes() for name in ("model.safetensors", "map/clipmap.safetensors")]
    finish(*argv, "--output_dir", tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("model.safetensors", "map/clipmap.safetensors")] == before


@pytest.mark.recipes
def test_evaluate_measures_retrieval(finish, teacher_folder, pairs_parquet, tmp_path):
    result = tmp_path / "results.json"
    printed = finish("evaluate.py", "--model", teacher_folder, "--eval_data", pairs_parquet, "--output", result)
    content = json.loads(result.read_text())
    assert content["metrics"].keys() == RECALLS
    assert all(0 <= value <= 1 for value in content["metrics"].values())
    assert f"mean_recall: {content['metrics']['mean_recall']:.4f}" in printed
    assert content["arguments"]["model"] == str(teacher_folder)


@pytest.mark.recipes
def test_evaluate_classifies_labeled_images(finish, teacher_folder, pairs_parquet, tmp_path):
    result = tmp_path / "results.json"
    argv = ("--model", teacher_folder, "--eval_data", pairs_parquet, "--output", result)
    finish("evaluate.py", *argv, "--label_column", "caption", "--templates", "a {}", "the {}")
    metrics = json.loads(result.read_text())["metrics"]
    assert metrics.keys() == {"accuracy@1", "accuracy@5", "mean_per_class_recall"}


@pytest.mark.recipes
def test_evaluate_measures_the_agreement_with_a_teacher(finish, teacher_folder, pairs_parquet, tmp_path):
    (tmp_path / "queries.txt").write_text("red circle\nblue bar\na dog\n")
    argv = ("--model", teacher_folder, "--agreement_with", teacher_folder, "--eval_data", pairs_parquet)
    printed = finish("evaluate.py", *argv, "--texts", tmp_path / "queries.txt")
    assert "mean_agreement: 1.0000" in printed and "decisions: 1.0000" in printed


@pytest.mark.recipes
def test_compress_and_distill_make_students_for_labels_that_evaluate_reads(
    finish, steps, teacher_folder, pairs_parquet, tmp_path
):
    (tmp_path / "names.txt").write_text("red circle\nblue bar\na dog\n")
    data = ("--train_data", pairs_parquet, "--labels", f"labels:{tmp_path / 'names.txt'}", *steps("distillation"))
    made, distilled = tmp_path / "made", tmp_path / "distilled"
    command = ("compress.py", "--teacher", teacher_folder, *SMALL, "--initializer", "diagonal", *data)
    printed = finish(*command, "--output_dir", made)
    assert f"CLIPVisionModelWithProjection.from_pretrained('{made}')" in printed
    again = finish("compress.py", "--config", made / "arguments.yaml", "--output_dir", tmp_path / "again")
    assert "(2 steps, 16 pairs" in again
    weights = [load_file(folder / "model.safetensors") for folder in (made, tmp_path / "again")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    whole = ("--student_model", teacher_folder, "--teacher", teacher_folder)
    finish("distill.py", *whole, *data, "--output_dir", distilled)
    for folder in (made, distilled):
        assert json.loads((folder / "labels.json").read_text()) == ["red circle", "blue bar", "a dog"]
        argv = ("--model", folder, "--eval_data", pairs_parquet, "--agreement_with", teacher_folder)
        assert re.search(r"^decisions: [01]\.\d+$", finish("evaluate.py", *argv), re.MULTILINE)


@pytest.mark.recipes
def test_compare_measures_models_side_by_side(finish, teacher_folder, pairs_parquet, tmp_path):
    other = shutil.copytree(teacher_folder, tmp_path / "other")
    data = ("--eval_data", pairs_parquet, "--rounds", 1, "--output_dir", tmp_path / "out")
    printed = finish("compare.py", teacher_folder, other, *data)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.md",
        "index.html",
        "quality.png",
    }
    results = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert list(results) == [teacher_folder.name, "other"] and "| other" in printed
    assert results["other"]["mean_recall"] == results[teacher_folder.name]["mean_recall"]
    assert {one["batch_size"] for one in results["other"]["milliseconds"]} == {1, 8, 32}
    assert 0 < results["other"]["libraries_memory_bytes"] < results["other"]["peak_memory_bytes"]


@pytest.mark.recipes
def test_evaluate_goes_through_sets_and_goes_on_where_it_stopped(finish, start, teacher_folder, tmp_path):
    for name in ("cifar10", "voc2007", "flickr30k"):
        eval_set = EVAL_SETS[name]
        write_set(tmp_path / "sets" / eval_set.folder, rows_for(eval_set.task), eval_set.task)
    argv = (
        "evaluate.py",
        "--model",
        teacher_folder,
        "--sets_dir",
        tmp_path / "sets",
        "--output",
        tmp_path / "results",
    )
    finish(*argv, "--sets", "cifar10")
    written = (tmp_path / "results" / "cifar10.json").stat().st_mtime_ns
    printed = finish(*argv, "--sets", "cifar10,voc2007", "flickr30k", "--num_workers", 1)
    assert (tmp_path / "results" / "cifar10.json").stat().st_mtime_ns == written
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:]
    assert rows == ["cifar10", "voc2007", "flickr30k"]
    result = json.loads((tmp_path / "results" / "voc2007.json").read_text())
    assert result["metrics"].keys() == {"map_11_point"} and result["model"]["id"] == str(teacher_folder)
    mismatch = start(*argv, "--suite", "paper")  # begins with a set that is not there
    assert mismatch.returncode != 0 and "wds_food101/test' must hold nshards.txt" in mismatch.stderr


@pytest.mark.recipes
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "Give either eval_data, or sets or a suite"),
        (("--eval_data", "pairs.parquet", "--sets", "mnist"), "Give either eval_data, or sets or a suite"),
        (("--sets", "mnist"), "Sets need an output folder"),
        (("--sets", "mnist", "--output", "out", "--templates", "a {}"), "have labels and templates of their own"),
        (("--sets", "emnist", "--output", "out"), "['emnist'] are unknown; choose from ['caltech101', "),
    ],
    ids=str,
)
def test_evaluate_refuses_what_does_not_go_together(start, teacher_folder, argv, message):
    result = start("evaluate.py", "--model", teacher_folder, *argv)
    assert result.returncode != 0 and message in result.stderr


@pytest.fixture(scope="module")
def demo(steps, teacher_folder, pairs_parquet) -> list:
    """A tiny demo of all methods."""
    methods = ("distillation", "calibrated", "ternary", "manual", "scratch")
    batches = [word for name in methods for word in (f"--{name}_batch_size", 8)]
    data = ("--teacher", teacher_folder, "--train_data", pairs_parquet, "--eval_data", pairs_parquet)
    numbers = ("--pairs", 32, "--calibration_pairs", 8, "--views", 1, "--eval_steps", 1)
    return ["demo.py", *data, *SMALL, *steps("mapping"), *batches, *numbers]


@pytest.fixture(scope="module")
def whole_demo(finish, demo, tmp_path_factory) -> tuple[str, Path]:
    """What a tiny demo prints, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    return finish(*demo, "--output_dir", folder), folder


def rows_of(printed: str) -> list[list[str]]:
    """The cells of a printed table but for its last column, the seconds."""
    return [line.split("|")[1:-2] for line in printed.splitlines() if line.startswith("|")]


@pytest.mark.recipes
def test_demo_compares_students_that_saw_the_same_number_of_pairs(whole_demo):
    printed, folder = whole_demo
    assert len(rows_of(printed)) == 9  # header, rule, seven models
    assert {"results.json", "results.md", "index.html"} <= {path.name for path in folder.iterdir()}
    check_student(folder / "student", vision_width=32)
    assert "quantization_config" in json.loads((folder / "ternary" / "config.json").read_text())
    expected = {"mapped": 16, "clip-map": 16, "student": 24, "ternary": 24, "manual": 32, "scratch": 32}
    assert {name: log_of(folder / name)[-1]["pairs"] for name in expected} == expected


@pytest.mark.recipes
def test_demo_prints_one_table_then_where_the_page_is_and_what_to_type_next(whole_demo):
    printed, folder = whole_demo
    table, rest = printed.split("\n\n")
    assert len(set(map(len, table.splitlines()))) == 1
    assert (folder / "results.md").read_text().strip() == table
    assert str(folder / "index.html") in rest.splitlines()[0]
    assert re.match(r"    (\S+/)?clipmap-hf compress --teacher ", rest.splitlines()[-1])


@pytest.mark.recipes
def test_demo_prints_a_row_when_it_is_ready_and_goes_on_after_a_kill(finish, demo, whole_demo, environment, tmp_path):
    argv = [*demo, "--output_dir", tmp_path]
    command = [sys.executable, str(RECIPES / argv[0]), *map(str, argv[1:])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("| calibrated, distilled"):
                break
        assert process.poll() is None and not (tmp_path / "results.json").exists()
        process.kill()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "student" / "checkpoints").rglob("*.safetensors")}
    assert made
    seconds = json.loads((tmp_path / "start" / "seconds.json").read_text())
    assert rows_of(finish(*argv)) == rows_of(whole_demo[0])
    assert {path: path.stat().st_mtime_ns for path in made} == made  # what was trained is not trained again
    assert json.loads((tmp_path / "results.json").read_text())["calibrated, not trained"]["seconds"] == seconds


# What is not accepted


def test_an_unknown_option_is_an_error_that_names_it(start, tmp_path):
    required = ("--teacher", "clip", "--train_data", "pairs.parquet", "--output_dir", tmp_path / "out")
    result = start("map.py", *required, "--mapping_learning_rat", 1e-3)  # no abbreviations either
    assert result.returncode != 0 and "--mapping_learning_rat" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"teachr": "clip"}, "teachr"),
        ({"mapping": {"lr": 1e-3}}, "lr"),
        ({"distillation": {"temperature": 2}}, "temp"),
    ],
    ids=["top", "own section", "other recipe's section"],
)
def test_an_unknown_key_of_a_config_is_an_error_that_names_it(start, tmp_path, content, named):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    required = ("--teacher", "clip", "--train_data", "pairs.parquet", "--output_dir", tmp_path / "out")
    result = start("map.py", "--config", config, *required)
    assert result.returncode != 0
    assert "unknown keys" in result.stderr and f"'{named}" in result.stderr


def test_a_missing_option_is_an_error_that_names_it(start):
    result = start("distill.py", "--teacher", "clip", "--train_data", "pairs.parquet")
    assert result.returncode != 0
    assert "--student_model" in result.stderr and "--output_dir" in result.stderr


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("[a-z]*.py")))
def test_help_is_instant_and_complete(recipe):
    """It waits for neither torch nor datasets."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    slow = sorted({'torch', 'datasets', 'accelerate'} & set(sys.modules))\n"
        "    sys.exit(f'imported {slow}' if slow else end.code)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    command = [sys.executable, "-c", code, str(RECIPES / recipe)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert f"python recipes/{recipe}" in result.stdout  # the example of its docstring


@pytest.mark.recipes
def test_a_student_goes_to_open_clip_and_back(finish, teacher_folder, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    finish("convert_open_clip.py", "--model", teacher_folder, "--to", "open_clip", "--output_dir", there)
    finish("convert_open_clip.py", "--model", there, "--to", "transformers", "--output_dir", back)
    found, expected = (load_file(one / "model.safetensors") for one in (back, teacher_folder))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert load_processor(str(back)).tokenizer.model_max_length == 16
