"""What a run begins with, and what of it the same command takes up again."""

import dataclasses
import shutil
from unittest.mock import Mock

import pytest
import torch
from transformers import CLIPModel

from clipmap_hf import Budget, ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.further_texts import further_texts
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline import start as pipeline_start
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.start import choose_student, start_compressor
from clipmap_hf.training.run_arguments import RunArguments


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def data(pairs_parquet) -> DataArguments:
    return DataArguments(str(pairs_parquet), crop_scale=[0.4, 1.0], keyword_column=["keywords"])


STARTED = dataclasses.replace(SMALL, refit=False)


@pytest.fixture
def start(teacher_folder, data, tmp_path):
    """A function that starts a compressor: `start(STARTED, pairs=…, data=…, seed=…)`."""

    def run(student: ClipMapConfig | None, source=teacher_folder, pairs: int = 8, data=data, calibration=None, **run):
        calibration = CalibrationArguments(calibration, pairs)
        arguments = RunArguments(**{"output_dir": str(tmp_path / "out")} | run)
        return start_compressor(ModelId(str(source)), student, RunContext(arguments, data), calibration)

    return run


def weights(compressor: ClipMapCompressor) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in compressor.export().state_dict().values()])


@pytest.mark.parametrize("initializer", [None, "calibrated", "importance"])
def test_a_start_is_that_of_the_library(start, teacher_folder, tiny_processor, data, initializer):
    config = dataclasses.replace(STARTED, initializer=initializer)
    rows = load_pairs(data.train_data, caption_columns=["caption", "keywords"])
    processors = (tiny_processor.tokenizer, tiny_processor.image_processor)
    drawing = PairCollator(*processors, keyword_columns=["keywords"], caption_sampling="random")
    pairs = CalibrationPairs(rows, tiny_processor, 8, seed=3, more_texts=further_texts(rows, drawing, 24, seed=3))
    expected = ClipMapCompressor.from_pretrained(teacher_folder, config, calibration_data=pairs)
    given = start(config, seed=3)
    assert torch.equal(weights(given), weights(expected))
    assert given.map_config == expected.map_config and given.map_config.initializer == (initializer or "calibrated")


@pytest.mark.parametrize("initializer", ["mope", "taylor"])
def test_a_start_that_compares_texts_with_images_reads_each_pair_once(
    start, teacher_folder, tiny_processor, data, initializer
):
    config = dataclasses.replace(STARTED, initializer=initializer)
    pairs = CalibrationPairs(load_pairs(data.train_data), tiny_processor, 24)
    expected = weights(ClipMapCompressor.from_pretrained(teacher_folder, config, calibration_data=pairs))
    given = ClipMapCompressor.from_pretrained(teacher_folder, config, calibration_data=data.train_data)
    assert torch.equal(weights(start(config, pairs=1000)), expected) and torch.equal(weights(given), expected)


def test_other_initializers_start_without_data(start, data, no_start):
    no_start()
    nowhere = dataclasses.replace(data, train_data="/no/such/pairs.parquet")
    for initializer in ("diagonal", "random"):
        config = dataclasses.replace(STARTED, initializer=initializer)
        assert start(config, data=nowhere).map_config == config


def test_without_a_student_a_map_is_gone_on_with(start, tmp_path, no_start):
    first = start(STARTED)
    first.save_pretrained(tmp_path / "map")
    no_start()
    assert torch.equal(weights(start(None, source=tmp_path / "map")), weights(first))


def test_calibration_data_has_the_columns_of_the_training_data(start, data, pairs_tar):
    tars = DataArguments("/no/such.tar", image_column="png", caption_column=["txt"])
    given = start(STARTED, pairs=24, data=tars, calibration=str(pairs_tar))
    same = start(STARTED, pairs=24, data=dataclasses.replace(data, keyword_column=[]), resume="never")
    near = (weights(given) - weights(same)).norm() / weights(same).norm()
    assert near < 1e-3  # the same pairs in another order


def test_a_start_from_a_stream_takes_its_first_pairs(start, pairs_tars, tiny_processor, teacher_folder):
    stream = DataArguments(pairs_tars, streaming=True, image_column="png", caption_column=["txt"])
    rows = load_pairs(pairs_tars, image_column="png", caption_columns=["txt"], streaming=True)
    pairs = CalibrationPairs(rows.rename_column("txt", "caption"), tiny_processor, 8)
    expected = ClipMapCompressor.from_pretrained(teacher_folder, STARTED, calibration_data=pairs)
    assert torch.equal(weights(start(STARTED, data=stream)), weights(expected))


def test_a_start_is_kept_and_taken_up_by_the_same_command(start, tmp_path, no_start):
    first = start(STARTED)
    assert (tmp_path / "out" / "start" / "map" / "clipmap.safetensors").is_file()
    assert torch.equal(CLIPModel.from_pretrained(tmp_path / "out" / "start").logit_scale, first.export().logit_scale)
    no_start()
    again = start(STARTED)
    assert torch.equal(weights(again), weights(first)) and again.map_config == first.map_config
    assert again.teacher_id == first.teacher_id


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"pairs": 9}, {"resume": "never"}, {"student": dataclasses.replace(STARTED, refit=True)}]
)
def test_another_command_starts_anew(start, no_start, changes):
    start(STARTED)
    no_start()
    with pytest.raises(pytest.fail.Exception, match="it was calibrated"):
        start(**{"student": STARTED} | changes)


@pytest.mark.parametrize("changes", [{"keyword_column": []}, {"caption_sampling": "first"}, {"mix": 0.5}])
def test_other_texts_of_training_are_another_start(start, data, no_start, changes):
    start(STARTED)
    no_start()
    with pytest.raises(pytest.fail.Exception, match="it was calibrated"):
        start(STARTED, data=dataclasses.replace(data, **changes))


def test_a_start_for_another_student_takes_the_place_of_the_first(start, no_start):
    start(STARTED)
    other = dataclasses.replace(STARTED, projection_dim=16)
    second = start(other)
    no_start()
    assert torch.equal(weights(start(other)), weights(second))


def test_a_start_that_was_not_written_to_its_end_is_not_taken_for_the_one_before(start, monkeypatch):
    start(STARTED)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_start, "write_json", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(dataclasses.replace(STARTED, projection_dim=16))
    assert start(STARTED).map_config.projection_dim is None


def test_a_stream_is_another_start(start, pairs_tars, no_start):
    table = DataArguments(pairs_tars, image_column="png", caption_column=["txt"])
    start(STARTED, data=table)
    no_start()
    with pytest.raises(pytest.fail.Exception, match="it was calibrated"):
        start(STARTED, data=dataclasses.replace(table, streaming=True))


def test_other_calibration_data_is_another_start(start, pairs_parquet, tmp_path, no_start):
    rows, path = load_pairs(str(pairs_parquet)), tmp_path / "calibration.parquet"
    rows.select(range(8)).to_parquet(path)
    start(STARTED, calibration=str(path))
    rows.select(range(8, 16)).to_parquet(path)
    no_start()
    with pytest.raises(pytest.fail.Exception, match="it was calibrated"):
        start(STARTED, calibration=str(path))


def test_other_weights_of_a_teacher_are_another_start(start, teacher_folder, tmp_path, no_start):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    start(STARTED, source=folder)
    model = CLIPModel.from_pretrained(folder)
    model.visual_projection.weight.data += 1
    model.save_pretrained(folder)
    no_start()
    with pytest.raises(pytest.fail.Exception, match="it was calibrated"):
        start(STARTED, source=folder)


# The shape within a budget

BUDGET = dataclasses.replace(STARTED, vision=TowerConfig(), text=TowerConfig(), budget=Budget(params="100k"))


@pytest.mark.parametrize("initializer", ["diagonal", "calibrated"])
def test_a_shape_is_chosen_once_and_the_same_command_takes_it_up(start, tmp_path, no_search, capsys, initializer):
    student = dataclasses.replace(BUDGET, initializer=initializer)
    first, printed = start(student), capsys.readouterr().out
    assert first.map_config.budget is None and first.cost()["student"].parameters <= 100_000
    assert ("vision times text" if initializer == "calibrated" else "literature") in printed
    no_search()
    again = start(student)
    assert again.map_config == first.map_config and capsys.readouterr().out == printed
    assert torch.equal(weights(again), weights(first))


@pytest.mark.parametrize(
    "changes", [{"resume": "never"}, {"pairs": 9}, {"student": dataclasses.replace(BUDGET, budget={"params": "99k"})}]
)
def test_another_command_searches_anew(start, no_search, changes):
    start(BUDGET)
    no_search()
    with pytest.raises(pytest.fail.Exception, match="it was searched"):
        start(**{"student": BUDGET} | changes)


def test_without_calibration_a_shape_is_chosen_without_data(teacher_folder, data, tmp_path, capsys):
    nowhere = dataclasses.replace(data, train_data="/no/such/pairs.parquet")
    source, context = ModelId(str(teacher_folder)), RunContext(RunArguments(str(tmp_path)), nowhere)
    chosen = choose_student(source, BUDGET, context, calibration=None)
    assert chosen.budget is None and "literature" in capsys.readouterr().out
    assert choose_student(source, chosen, context, calibration=None) is chosen


def test_calibration_data_of_the_same_name_is_the_training_data(data, tmp_path):
    context = RunContext(RunArguments(str(tmp_path)), data)
    same = CalibrationArguments("".join([*data.train_data]))  # an equal string, not the same object
    assert context._calibration_rows(same) is context.pairs.pairs
