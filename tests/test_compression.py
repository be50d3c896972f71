"""What a compression refuses before anything is loaded; tests/test_recipes.py runs it."""

import pytest

from clipmap_hf import PRESETS, ClipMapConfig
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.compression import CompressionArguments, compress_in_run
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, MaskingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


@pytest.mark.parametrize(
    ("student", "mapping_steps", "message"),
    [
        (None, 0, "Masks need to know what to select"),
        (ClipMapConfig(initializer="calibrated"), 0, "leave out initializer='calibrated'"),
        (PRESETS["tiny"], 3, "Masks select by themselves"),
    ],
)
def test_masks_select_by_themselves(student, mapping_steps, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compress_in_run(
            ModelId("nowhere"),
            [ModelId("nowhere")],
            student,
            RunContext(RunArguments(str(tmp_path)), DataArguments("nothing.parquet")),
            CompressionArguments(
                masking=MaskingStageArguments(max_steps=1),
                mapping=MappingStageArguments(max_steps=mapping_steps),
                distillation=DistillationStageArguments(max_steps=1),
            ),
        )
