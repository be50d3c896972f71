"""Calibrated starts of teachers with huge activations lose little more than those of others."""

import copy
import dataclasses

import datasets
import pytest
from calibrated_starts import NARROW, TOWERS, frugal, nearness, random_pairs, split, started, streams
from outliers import plant_outliers

from clipmap_hf import ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.teacher import Teacher


PLACES = pytest.mark.parametrize("behind", [0, 2], ids=["everywhere", "behind two layers"])


@PLACES
def test_planted_channels_are_as_huge_as_those_of_large_models_and_the_rest_hardly_changes(shared_teacher, behind):
    pairs = random_pairs(shared_teacher.config, 32)
    planted = plant_outliers(copy.deepcopy(shared_teacher), pairs, 1000, behind)
    for name in TOWERS:
        last = streams(planted, name, pairs)[-1].abs()
        assert last[..., 3].min() > 100 * last.median()
    assert all(cosine > 0.9 for cosine in nearness(planted, shared_teacher, pairs).values())


@PLACES
@pytest.mark.parametrize("refit", [False, True], ids=["mapped", "refitted"])
def test_a_teacher_of_few_axes_with_huge_channels_is_compressed_without_loss(shared_teacher, behind, refit):
    batches = split(random_pairs(shared_teacher.config, 96), 48)
    teacher = plant_outliers(frugal(shared_teacher), batches[0], 1000, behind)
    shape = TowerConfig(48, num_attention_heads=3)  # 31 axes of the teacher's, one more, and some that are not needed
    config = dataclasses.replace(NARROW, vision=shape, text=shape, refit=refit)
    student = started(teacher, config, batches).export()
    near = nearness(student, teacher, random_pairs(shared_teacher.config, 32, seed=1))
    assert all(cosine > 0.999 for cosine in near.values()), near


@pytest.mark.slow
@PLACES
def test_a_trained_teacher_with_huge_channels_keeps_nearly_as_much(tmp_path, behind):
    teacher, pairs = Teacher.load(str(TEACHER)), datasets.Dataset.from_parquet(str(TRAIN_PAIRS)).shuffle(seed=0)
    test = list(evaluation_batches(DataArguments(str(TRAIN_PAIRS), eval_data=str(TEST_PAIRS)), teacher.processor))
    first, shares = {name: test[0][name] for name in ("pixel_values", "input_ids")}, {}
    for size in (0, 1000):
        model = plant_outliers(copy.deepcopy(teacher.model), first, size, behind) if size else teacher.model
        folder = tmp_path / str(size)
        for part in (model, teacher.processor):
            part.save_pretrained(folder)
        config = ClipMapConfig(TowerConfig(96), TowerConfig(64), initializer="calibrated", refit_steps=0)
        student = ClipMapCompressor.from_pretrained(
            str(folder), config, calibration_data=pairs, calibration_pairs=512
        ).export()
        kept, whole = (evaluate_retrieval(one, test)["text_to_image_recall@5"] for one in (student, model))
        shares[size] = kept / whole
    assert shares[1000] > 0.83 * shares[0], shares
