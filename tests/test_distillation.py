"""Distillation and mapping as the recipes run them, in this process."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import randomize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from clipmap_hf import ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.families import CLIP
from clipmap_hf.models.teacher import Teacher, check_same_preprocessing
from clipmap_hf.pipeline import distillation, measures
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.starts import start_mapper
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.teacher_cache.make import make_teacher_cache
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments
from clipmap_hf.training.result import TrainResult
from clipmap_hf.training.run_arguments import RunArguments


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """Counting multiplications takes longer than a tiny run, and gives the same for the same sizes."""
    known, count = {}, distillation.model_cost

    def model_cost(config):
        key = config.to_json_string()
        return known[key] if key in known else known.setdefault(key, count(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "model_cost", model_cost)
        yield


@pytest.fixture
def teacher(tiny_teacher, tiny_processor) -> Teacher:
    return Teacher(tiny_teacher, tiny_processor, "me/teacher")


@pytest.fixture(scope="module")
def second_model(tiny_config) -> CLIPModel:
    return randomize(CLIPModel(tiny_config(projection_dim=16)), seed=1).eval()


@pytest.fixture
def teachers(teacher, second_model, tiny_processor) -> list[Teacher]:
    """Two, of different projection dimensions."""
    return [teacher, Teacher(copy.deepcopy(second_model), tiny_processor, "me/second", "v2")]


@pytest.fixture
def data(pairs_parquet) -> DataArguments:
    return DataArguments(str(pairs_parquet), crop_scale=[0.4, 1.0], keyword_column=["keywords"])


@pytest.fixture
def distill(teacher, tiny_processor, data, tmp_path):
    """A function that distills a fresh student: `distill(teachers, data=…, cache=…, max_steps=…)`."""

    def run(teachers: list[Teacher], **values) -> tuple[TrainResult, list[dict], CLIPModel]:
        student = start_mapper(copy.deepcopy(teacher.model), SMALL).export()
        numbers = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}
        numbers |= {name: values.pop(name) for name in ("max_steps", "micro_batch_size", "freeze") if name in values}
        options = {"data": data, "output_dir": str(tmp_path / "out"), "resume": "never", "seed": 0} | values
        cache, recipe = options.pop("cache", None), options.pop("recipe", None)
        chosen, processor = options.pop("data"), options.pop("processor", tiny_processor)
        run = RunArguments(logging_steps=1, **options)
        context = RunContext(run, chosen, recipe, cache or TeacherCacheArguments())
        arguments = DistillationStageArguments(**numbers)
        result = DistillationTrainer(student, teachers, arguments, processing_class=processor, context=context).train()
        log = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
        return result, log, student

    return run


def losses(log: list[dict]) -> list[float]:
    return [line["loss"] for line in log if "loss" in line]


def test_a_cache_cannot_be_asked_for_streams(teacher, teachers, tiny_processor, data, tmp_path):
    numbers = DistillationStageArguments(max_steps=1, batch_size=8, losses={"affinity": 1.0, "hidden": 1.0})
    cache, run = TeacherCacheArguments(str(tmp_path / "cache")), RunArguments(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="leave out teacher_cache, or the loss"):
        DistillationTrainer(teacher.model, teachers, numbers, context=RunContext(run, data, None, cache)).train()
    assert not (tmp_path / "cache").exists()


# Teachers that fit


def with_processor(teacher: Teacher, **changes) -> Teacher:
    """The teacher with a processor of its own, changed."""
    processor = copy.deepcopy(teacher.processor)
    for name, value in changes.items():
        holder = processor.tokenizer if hasattr(processor.tokenizer, name) else processor.image_processor
        setattr(holder, name, value)
    return dataclasses.replace(teacher, processor=processor, id="me/other")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std"),
        ({"size": {"height": 64, "width": 64}}, "size"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 128}, "rescale_factor"),
        ({"do_normalize": False}, "do_normalize, image_mean, image_std"),
        ({"do_rescale": False}, "do_rescale, rescale_factor"),
        ({"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, "do_center_crop, crop_size"),
        ({"model_max_length": 8}, "model_max_length"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "image_mean, image_std"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_teacher_that_preprocesses_otherwise_is_refused_by_name(distill, teacher, changes, words):
    with pytest.raises(ValueError, match=rf"'me/other' and the student preprocess in different ways \({words}\)"):
        distill([teacher, with_processor(teacher, **changes)])


def test_a_teacher_of_another_vocabulary_is_refused_by_name(distill, teacher, tiny_processor):
    vocab = tiny_processor.tokenizer.get_vocab()
    first, second = sorted(vocab)[:2]
    swapped = vocab | {first: vocab[second], second: vocab[first]}  # of the same size
    tokenizer = CLIPTokenizer(vocab=swapped, merges=[], model_max_length=tiny_processor.tokenizer.model_max_length)
    other = CLIPProcessor(image_processor=tiny_processor.image_processor, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"'me/other' and the student preprocess .* \(vocabulary\)"):
        distill([dataclasses.replace(teacher, processor=other, id="me/other")])


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_of_a_processor_that_scales_in_another_way_learns_the_same(distill, teacher, tmp_path, options, cached):
    """Bytes less 255 times the mean, over 255 times the standard deviation, are the usual pixels."""
    images = teacher.processor.image_processor
    mean, std = ([255 * value for value in values] for values in (images.image_mean, images.image_std))
    runs = []
    for changes in ({}, {"do_rescale": False, "image_mean": mean, "image_std": std}):
        other = with_processor(teacher, **changes)
        cache = TeacherCacheArguments(str(tmp_path / f"cache{len(runs)}"), 2) if cached else None
        runs.append(losses(distill([other], processor=other.processor, cache=cache, max_steps=2, **options)[1]))
    torch.testing.assert_close(*map(torch.tensor, runs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{"do_convert_rgb": False}, {"crop_size": {"height": 7, "width": 7}}, {"pad_size": 7}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_setting_without_effect_may_differ(distill, teacher, changes):
    assert distill([with_processor(teacher, **changes)], max_steps=1)[0].steps == 1


def test_a_mean_of_all_channels_is_a_mean_of_each(teacher):
    student = with_processor(teacher, image_mean=[0.5, 0.5, 0.5])
    check_same_preprocessing(student.processor, [with_processor(teacher, image_mean=0.5)])


def test_a_teacher_whose_processor_is_as_good_as_the_students_teaches(distill, teacher, teacher_folder):
    loaded = Teacher.load(str(teacher_folder))
    assert loaded.processor is not teacher.processor and loaded.id == str(teacher_folder)
    assert isinstance(loaded.processor.image_processor, CLIPImageProcessorPil)
    result, log, _ = distill([loaded], max_steps=1)
    assert result.steps == 1 and losses(log) == losses(distill([teacher], max_steps=1)[1])


# Distillation


def test_a_distilled_student_is_written_with_its_card_and_results(distill, teachers, data, tmp_path):
    data = dataclasses.replace(data, eval_data=data.train_data)
    result, log, student = distill(teachers, data=data, eval_steps=4, recipe="steps: 6\n")
    written = CLIPModel.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(written[name], tensor.cpu()), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "me/teacher" in card and "from the teacher and `me/second` (losses: affinity)" in card and "steps: 6" in card
    )
    assert f"{100 * result.metrics['image_to_text_recall@5']:.1f}" in card
    assert [line["step"] for line in log if "eval_mean_recall" in line] == [4, 6]
    assert (tmp_path / "out" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("freeze", ["vision", "text"])
def test_a_frozen_tower_stays_as_it_is_and_the_other_learns(distill, teacher, teachers, freeze):
    before = start_mapper(copy.deepcopy(teacher.model), SMALL).export().state_dict()
    after = distill(teachers, freeze=freeze)[2].cpu().state_dict()
    changed = {CLIP.match(name).tower for name in before if not torch.equal(before[name], after[name])}
    assert changed - {None} == {"vision", "text"} - {freeze}


def test_several_teachers_teach_otherwise_than_one(distill, teachers):
    first, both, both_again = (distill(chosen)[1] for chosen in (teachers[:1], teachers, teachers))
    assert losses(both) == losses(both_again) and abs(losses(first)[0] - losses(both)[0]) > 1e-2


def test_a_distillation_is_not_gone_on_with_by_other_teachers_or_for_other_students(distill, teachers):
    distill(teachers[:1])
    with pytest.raises(ValueError, match=r'teachers was \[\["me/teacher", null\]\], is .*"me/second"'):
        distill(teachers, resume="auto")


def test_a_distillation_goes_on_where_it_stopped(distill, teachers, tmp_path, monkeypatch):
    _, log, student = distill(teachers, save_steps=2, output_dir=str(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        count, step = [0], torch.optim.AdamW.step

        def fail(self, *args, **kwargs):
            count[0] += 1
            if count[0] == 4:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            distill(teachers, save_steps=2)
    _, again, resumed = distill(teachers, save_steps=2, resume="auto")
    assert losses(again) == losses(log)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))


# Teacher caches


@pytest.fixture
def cache(tmp_path) -> TeacherCacheArguments:
    return TeacherCacheArguments(str(tmp_path / "cache"), views=2)


def test_cached_teachers_teach_like_live_ones_while_their_views_last(distill, teachers, cache):
    _, live, _ = distill(teachers, max_steps=9)
    _, cached, student = distill(teachers, max_steps=9, cache=cache)
    assert losses(cached)[:6] == pytest.approx(losses(live)[:6], rel=1e-3)  # two epochs of three steps
    assert losses(cached)[6:] != pytest.approx(losses(live)[6:], rel=1e-3)  # the third has the views of the first
    assert not [module for module in student.modules() if module is teachers[0].model]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cache_is_made_of_a_stream_and_teaches_one(distill, teachers, cache, pairs_tars, num_workers):
    data = DataArguments(pairs_tars, streaming=True, shuffle_buffer=5, image_column="png", caption_column=["txt"])
    options = {"data": data, "max_steps": 3, "dataloader_num_workers": num_workers, "micro_batch_size": 4}
    _, live, _ = distill(teachers, **options)
    _, cached, _ = distill(teachers, cache=cache, **options)
    assert losses(cached) == pytest.approx(losses(live), rel=1e-3)


def test_a_cache_that_is_there_is_read_and_no_teacher_runs(distill, teachers, cache, tiny_processor, data):
    made = make_teacher_cache(teachers, tiny_processor, data, cache)
    assert made.views == 2 and made.manifest["teachers"][1] | {"weights": ""} == {
        "id": "me/second",
        "revision": "v2",
        "weights": "",
        "projection_dim": 16,
    }
    for teacher in teachers:
        teacher.model.register_forward_pre_hook(lambda *_: pytest.fail("a teacher ran"))
        teacher.model.vision_model.register_forward_pre_hook(lambda *_: pytest.fail("a teacher ran"))
    result, log, _ = distill(teachers, cache=cache)
    assert result.steps == 6 and all(0 < loss < 100 for loss in losses(log))


REFUSED = {
    "augmentation": ({"crop_scale": [0.5, 1.0]}, {}, {}, "augmentation"),
    "flip": ({"flip": 0.5}, {}, {}, "augmentation"),
    "captions": ({"keyword_column": []}, {}, {}, "captions"),
    "seed": ({}, {"seed": 1}, {}, "seed"),
    "views": ({}, {}, {"views": 3}, "views"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_cache_of_something_else_is_refused_and_the_difference_named(distill, teacher, cache, data, what):
    changes, options, views, word = REFUSED[what]
    distill([teacher], cache=cache, max_steps=1)
    with pytest.raises(ValueError, match=rf"(?s)cache.*{word}"):
        distill(
            [teacher],
            cache=dataclasses.replace(cache, **views),
            data=dataclasses.replace(data, **changes),
            max_steps=1,
            **options,
        )
    distill([teacher], cache=cache, max_steps=1)  # still good


def test_a_cache_for_several_teachers_is_refused_if_they_preprocess_in_different_ways(teacher, data, cache):
    other = with_processor(teacher, image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"'me/other' and the student preprocess .* \(image_mean\)"):
        make_teacher_cache([teacher, other], teacher.processor, data, cache)


def test_a_cache_of_other_teachers_is_refused(distill, teachers, cache, tiny_config, tiny_processor):
    distill(teachers[:1], cache=cache, max_steps=1)
    other_weights = randomize(CLIPModel(tiny_config()), seed=5).eval()
    other = Teacher(other_weights, tiny_processor, "me/teacher")
    for chosen in (teachers, teachers[::-1], [other]):
        with pytest.raises(ValueError, match="(?s)cache.*teachers"):
            distill(chosen, cache=cache, max_steps=1)


def test_a_cache_of_other_files_is_refused(distill, teacher, cache, data, pairs_parquet, tmp_path):
    distill([teacher], cache=cache, max_steps=1)
    other = tmp_path / "other.parquet"
    other.write_bytes(pairs_parquet.read_bytes())
    with pytest.raises(ValueError, match=r"(?s)cache.*other\.parquet"):
        distill([teacher], cache=cache, data=dataclasses.replace(data, train_data=str(other)), max_steps=1)


def test_without_a_folder_nothing_is_cached(distill, teacher, tmp_path):
    _, log, _ = distill([teacher], cache=TeacherCacheArguments(), max_steps=2)
    assert losses(log) == losses(distill([teacher], max_steps=2)[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_teacher_is_evaluated_once_in_a_run(teacher, data, tmp_path, monkeypatch):
    evaluated = []
    embed = measures.embed_pairs
    monkeypatch.setattr(measures, "embed_pairs", lambda *args: evaluated.append(args[0]) or embed(*args))
    context = RunContext(RunArguments(str(tmp_path)), dataclasses.replace(data, eval_data=data.train_data))
    numbers = DistillationStageArguments(max_steps=1, batch_size=8)
    results = []
    for name in ("one", "two"):
        student = start_mapper(copy.deepcopy(teacher.model), SMALL).export()
        results.append(DistillationTrainer(student, teacher, numbers, context=context.inside(name)).train())
    assert [model is teacher.model for model in evaluated] == [True, False, False]
    expected = evaluate_retrieval(teacher.model, str(data.train_data), processor=teacher.processor)
    found = results[0].teacher_metrics
    assert found == results[1].teacher_metrics and {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["mean_agreement"] == 1


# Mapping


def test_a_mapping_trains_the_operators_and_writes_student_and_map(teacher_folder, data, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, student=SMALL)
    before = copy.deepcopy(compressor.mapper.state_dict())
    arguments = MappingStageArguments(max_steps=2, batch_size=8, micro_batch_size=4, warmup_steps=0)
    data = dataclasses.replace(data, eval_data=data.train_data)
    context = RunContext(RunArguments(str(tmp_path / "out")), data, recipe="steps: 2\n")
    result = MappingTrainer(compressor, arguments, context=context).train()
    after = compressor.mapper.cpu().state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith("delta")}
    assert (result.steps, result.pairs) == (2, 16) and 0 <= result.metrics["mean_recall"] <= 1
    loaded = ClipMapCompressor.from_pretrained(tmp_path / "out")
    for name, tensor in compressor.mapper.state_dict().items():
        assert torch.equal(loaded.mapper.state_dict()[name], tensor), name
    assert "steps: 2" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "arguments.yaml").read_text() == "steps: 2\n"


def test_a_refused_run_leaves_the_arguments_of_the_one_before(distill, teacher, tmp_path):
    distill([teacher], max_steps=1, recipe="chunks: 1\n")
    with pytest.raises(ValueError, match="micro_batch_size was null, is 4"):
        distill([teacher], max_steps=1, micro_batch_size=4, recipe="chunks: 2\n", resume="auto")
    assert (tmp_path / "out" / "arguments.yaml").read_text() == "chunks: 1\n"


def test_a_mapping_is_not_gone_on_with_for_another_student(teacher_folder, data, tmp_path):
    for depth, words in (("interval_front", None), ("spread", 'student.depth was "interval_front", is "spread"')):
        config = dataclasses.replace(SMALL, depth=depth)
        compressor = ClipMapCompressor.from_pretrained(teacher_folder, student=config)
        arguments = MappingStageArguments(max_steps=1, batch_size=8)
        context = RunContext(RunArguments(str(tmp_path / "out")), data)
        if words is None:
            MappingTrainer(compressor, arguments, context=context).train()
        else:
            with pytest.raises(ValueError, match=words):
                MappingTrainer(compressor, arguments, context=context).train()
