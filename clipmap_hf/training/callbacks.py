"""Transformers' callbacks in our loop: which there are, what they are told, and the trackers that they report to."""

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from difflib import get_close_matches
from typing import Any

import torch
from transformers import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import CallbackHandler
from transformers.utils import is_in_notebook

from clipmap_hf.config.json_values import json_values
from clipmap_hf.data.loader import BatchPlan
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.run_arguments import RunArguments


__all__ = ["callback_arguments", "callback_handler", "check_trackers"]

# On which `TrainingArguments` would act, of which they warn, or which they check in their own way.
_INERT = ("torch_compile", "gradient_checkpointing", "load_best_model_at_end")


def check_trackers(names: Sequence[str]) -> None:
    """
    Checks that experiment trackers can be used, before anything is trained.

    Args:
        names: As in `TrainingArguments.report_to`; `all` and `none` are allowed.

    Raises:
        ValueError: If transformers does not know one, or its package is not installed.
    """
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            near = get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {sorted(INTEGRATION_TO_CALLBACK)}."
            raise ValueError(f"report_to={name!r} is no tracker; {hint}")
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"report_to={name!r} needs a package that is not installed; install it: pip install {name}."
            )


def callback_handler(run: RunArguments, callbacks: Sequence[TrainerCallback | type] = ()) -> CallbackHandler:
    """
    Collects the callbacks of a run in transformers' order: the default flow, trackers, the caller's, progress.

    Args:
        run: Names the trackers, and says whether there is a progress bar.
        callbacks: The caller's own, as instances or classes.

    Raises:
        ValueError: If a tracker cannot be used.
    """
    check_trackers(run.report_to)
    names = run.report_to[0] if run.report_to in (["all"], ["none"]) else run.report_to
    trackers = get_reporting_integration_callbacks(names)
    return CallbackHandler([DefaultFlowCallback, *trackers, *callbacks, _progress(run)], None, None, None, None)


def callback_arguments(
    stage: StageArguments, run: RunArguments, plan: BatchPlan, device: torch.device
) -> TrainingArguments:
    """
    Returns what callbacks read as `args`: real `TrainingArguments` with the values of a run and its stage, and further
    fields for those that transformers does not have. The process must have joined the others already.

    Args:
        stage: The stage's numbers.
        run: How it runs.
        plan: How its pairs are split.
        device: Where it runs.
    """
    values = json_values(run) | json_values(stage) | {"batch_size": plan.batch_size, "lr_scheduler_type": "cosine"}
    values |= {"eval_strategy": run.evaluation, "greater_is_better": run.rises, "mixed_precision": run.precision}
    values["metric_for_best_model"] = run.deciding_metric
    values |= {name: run.precision == name for name in ("bf16", "fp16")}
    values["per_device_train_batch_size"] = plan.chunk_size
    values["gradient_accumulation_steps"] = plan.local_size // plan.chunk_size
    inert = {name: values.pop(name) for name in _INERT}
    known = {f.name for f in fields(TrainingArguments)}
    others = [(name, Any, field(default=None)) for name in sorted({*values, *inert} - known)]
    arguments = make_dataclass("CallbackArguments", others, bases=(TrainingArguments,))(
        **{name: value for name, value in values.items() if value is not None},
        accelerator_config={"use_configured_state": True},  # or it would part the processes
        use_cpu=device.type == "cpu",
    )
    for name, value in inert.items():
        setattr(arguments, name, value)
    return arguments


def _progress(run: RunArguments) -> type[TrainerCallback]:
    if run.disable_tqdm:
        return PrinterCallback
    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback  # imports IPython

        return NotebookProgressCallback
    return ProgressCallback
