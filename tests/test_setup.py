"""From arguments to what they name."""

import pytest

from clipmap_hf import PRESETS, ClipMapConfig, TowerConfig
from clipmap_hf.training import setup
from clipmap_hf.training.arguments import DataArguments, RunArguments, StageArguments, StudentArguments
from clipmap_hf.training.setup import evaluation_batches, map_config, run_stage, training_collator, training_pairs


def test_a_preset_is_taken_as_it_is():
    assert map_config(StudentArguments(student="small")) == PRESETS["small"]


def test_sizes_and_options_are_put_over_a_preset():
    config = map_config(StudentArguments(student="tiny", vision_hidden_size=192, tie_ffn=True, depth="spread"), seed=3)
    assert config.vision == TowerConfig(hidden_size=192, num_hidden_layers=4) and config.text == PRESETS["tiny"].text
    assert (config.tie_ffn, config.depth, config.seed, config.initializer) == (True, "spread", 3, "diagonal")


def test_sizes_alone_are_a_student_too():
    config = map_config(StudentArguments(text_num_hidden_layers=2))
    assert config == ClipMapConfig(text=TowerConfig(num_hidden_layers=2))


def test_nothing_said_is_no_student():
    assert map_config(StudentArguments()) is None


def test_an_unknown_preset_is_an_error_that_names_the_presets():
    with pytest.raises(ValueError, match=r"student='huge' is unknown; the presets are \['base', 'small', 'tiny'\]"):
        map_config(StudentArguments(student="huge"))


@pytest.fixture
def data(pairs_parquet) -> DataArguments:
    path = str(pairs_parquet)
    return DataArguments(train_data=path, eval_data=path, keyword_column=["keywords"], caption_sampling="random")


def test_training_reads_captions_and_keywords_and_evaluation_the_first_caption(data, tiny_processor):
    pairs = training_pairs(data)
    assert set(pairs[0]) == {"image", "caption", "keywords", "key"}
    batch = training_collator(data, tiny_processor, seed=0)([pairs[i] for i in range(4)])
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 4
    batches = list(evaluation_batches(data, tiny_processor, batch_size=10))
    assert [len(one["pixel_values"]) for one in batches] == [10, 10, 4]


def test_without_evaluation_data_there_is_no_evaluation(data, tiny_processor):
    data.eval_data = None
    assert evaluation_batches(data, tiny_processor) is None


def test_each_stage_has_a_seed_of_its_own(data, tiny_processor, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, stage, arguments, run, pairs, collator, *rest):
            seen.append((run.seed, collator.seed))

        def train(self):
            return None

    monkeypatch.setattr(setup, "Trainer", Recorder)
    for name, seed in (("mapping", 0), ("distillation", 0), ("mapping", 1), ("mapping", 0)):
        run_stage(None, StageArguments(), RunArguments("out", seed=seed), data, tiny_processor, name=name)
    assert seen[0] == seen[3] and len(set(seen)) == 3 and all(run == collate for run, collate in seen)
