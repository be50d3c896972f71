"""The model card of a student, rendered from the template beside it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData


__all__ = ["render_card"]

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def render_card(
    teacher: str,
    cost_table: str,
    *,
    model_class: str,
    method: str,
    results: Mapping[str, Mapping[str, float]] | None = None,
    recipe: str | None = None,
) -> ModelCard:
    """
    Renders the card; nothing of it is looked up on the Hub.

    Args:
        teacher: Hub id or folder of the teacher; only an id becomes `base_model`.
        cost_table: Sizes of teacher and student as a Markdown table.
        model_class: The student's class in transformers.
        method: One sentence on how the weights came to be.
        results: `{model: {metric: value between 0 and 1}}`, measured by this run.
        recipe: The resolved arguments as YAML; of absolute paths, which mean nothing elsewhere, only the last part is
            shown.
    """
    is_local = os.path.isdir(teacher)
    with_projection = model_class.replace("Model", "VisionModelWithProjection")  # SigLIP has none
    data = ModelCardData(
        base_model=None if is_local else teacher,
        base_model_relation=None if is_local else "finetune",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "clipmap_hf", "model-compression"],
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        teacher=os.path.basename(os.path.normpath(teacher)) if is_local else teacher,
        model_class=model_class,
        projection="WithProjection" if hasattr(transformers, with_projection) else "",
        method=method,
        cost_table=cost_table,
        results=results or {},
        recipe=recipe
        and yaml.safe_dump(_without_folders(yaml.safe_load(recipe)), sort_keys=False, allow_unicode=True),
    )


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    is_path = isinstance(value, str) and os.path.isabs(value)
    return os.path.basename(os.path.normpath(value)) if is_path else value
