"""Training from scratch: from a model with random weights and arguments to a written folder."""

from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from clipmap_hf.files.atomic import atomic_files
from clipmap_hf.models.fingerprints import config_values
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.stage import evaluation_function, run_stage
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_pretraining"]


def run_pretraining(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    arguments: StageArguments,
    context: RunContext,
    *,
    name: str = "pretrain",
) -> TrainResult:
    """
    Trains a model on the contrastive loss and writes it, with its processor, to the output folder.

    Args:
        model: Trained in place.
        processor: Its tokenizer and image processor.
        arguments: The stage's numbers.
        context: The run.
        name: Names the stage, as in `run_stage`.
    """

    def save(folder: Path, _metrics: dict[str, float]) -> None:
        with atomic_files(folder) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)

    return run_stage(
        ContrastiveStage(model, logit_scale=arguments.logit_scale, learn_logit_scale=arguments.learn_logit_scale),
        arguments,
        context,
        processor,
        name=name,
        evaluate=evaluation_function(context, processor),
        save=save,
        config={"student": config_values(model.config)},
    )
