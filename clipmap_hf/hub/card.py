"""Renders the model card of a student from a template."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.hub.license import teacher_license
from clipmap_hf.hub.results import SetResults, model_index, results_table
from clipmap_hf.models.model_id import names_folder


__all__ = ["add_to_card", "config_yaml", "hub_dataset", "render_card", "shown_name"]

_BEGIN, _END = "<!-- results on sets -->", "<!-- end of results on sets -->"  # lines of the template
# SigLIP was trained on texts that are padded to the full length, without a mask.
_SIGLIP_PADDING = 'padding="max_length", return_attention_mask=False'
_FILES = (".parquet", ".tar", "gz", ".txt", ".csv", ".tsv", ".jsonl")
_TEMPLATES = Path(__file__).parent / "templates"


def render_card(
    teacher: str,
    cost_table: str,
    *,
    model_class: str,
    method: str,
    revision: str | None = None,
    results: Sequence[SetResults] = (),
    recipe: str | None = None,
    license: Mapping[str, str] | None = None,
    status: str | None = None,
    figures: str | None = None,
    packed: bool = False,
    labels: Sequence[str] | None = None,
) -> ModelCard:
    """
    Renders the card. Nothing is looked up on the Hub.

    Args:
        teacher: Hub id or folder of the teacher. Only a Hub id becomes the card's `base_model`.
        cost_table: Markdown table with the sizes of teacher and student.
        model_class: The student's class, in transformers or here.
        method: A sentence on how the weights were made.
        revision: The teacher's branch, tag or commit on the Hub.
        results: The student's results.
        recipe: The resolved arguments of the run as YAML. Absolute paths, which mean nothing elsewhere, are shortened
            to their last part. Data sets on the Hub that the arguments name become the card's `datasets`.
        license: The teacher's license as metadata. By default, it is the result of `teacher_license`.
        status: A notice that readers must see first.
        figures: Figures that others published, as Markdown with their source.
        packed: Whether the weights are packed trits, which transformers can load only with this package.
        labels: The fixed list of texts of a student that is a vision tower alone.
    """
    is_local = names_folder(teacher)
    license = teacher_license(teacher, revision) if license is None else license
    shown = shown_name(teacher)
    arguments = yaml.safe_load(recipe) if recipe else {}
    index = {"model_name": f"compressed {shown}", "eval_results": model_index(results)} if results else {}
    own = not hasattr(transformers, model_class)  # loaded by the automatic classes after this package is imported
    with_projection = model_class.replace("Model", "VisionModelWithProjection")  # SigLIP has no such class
    data = ModelCardData(
        base_model=None if is_local else teacher,
        base_model_relation=None if is_local else ("quantized" if packed else "finetune"),
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if labels is None else "image-feature-extraction",
        tags=["clip", "clipmap_hf", "model-compression", *(["ternary", "1.58-bit"] if packed else [])],
        datasets=_find_training_sets(arguments) or None,
        **license,
        **index,
    )
    notes = [result.note for result in results if result.note]
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATES / ("model_card.md" if labels is None else "label_card.md")),
        teacher=shown,
        model_class=model_class,
        own=own,
        loader="AutoModel" if own else model_class,
        projection="WithProjection" if hasattr(transformers, with_projection) else "",
        method=method,
        cost_table=cost_table,
        results="\n\n".join([results_table(results), *notes]) if results else None,
        recipe=recipe and yaml.safe_dump(_shorten_paths(arguments), sort_keys=False, allow_unicode=True),
        license=license,
        status=status,
        figures=figures,
        packed=packed,
        labels=labels,
        padding=_SIGLIP_PADDING if model_class == "SiglipModel" else "padding=True",
    )


def shown_name(model: str) -> str:
    """Names a model to others: its Hub id, or the last part of its folder's path."""
    return os.path.basename(os.path.normpath(model)) if names_folder(model) else model


def add_to_card(card: ModelCard, results: Sequence[SetResults]) -> None:
    """
    Writes a student's results on sets into a card that `render_card` made. They replace the results that an earlier
    call wrote.

    Args:
        card: The card, which is changed in place.
        results: The student's results.

    Raises:
        ValueError: If the card has no place for results.
    """
    before, begin, rest = card.text.partition(_BEGIN)
    replaced, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"The card has no place for results: the lines {_BEGIN!r} and {_END!r} are not there.")
    card.text = f"{before}{begin}\n## Zero-shot evaluation\n\nIn percent:\n\n{results_table(results)}\n\n{end}{after}"
    new = model_index(results)
    measured = {(result.dataset_type, result.metric_type) for result in new}
    old = [
        result
        for result in card.data.eval_results or ()
        if (result.dataset_type, result.metric_type) not in measured
        and f"| {result.dataset_name}: {result.metric_type} " not in replaced
    ]
    card.data.eval_results = [*old, *new]
    card.data.model_name = card.data.model_name or "compressed CLIP"


def config_yaml(teacher: str, config: ClipMapConfig) -> str:
    """
    Formats a student's config as YAML that the recipes read.

    Args:
        teacher: Hub id or folder of the teacher.
        config: The student's config: its size, and how its operators are initialized.
    """
    values = config.to_dict()
    towers = {tower: values.pop(tower) for tower in ("vision", "text")}
    sizes = {f"{tower}_{name}": size for tower, inner in towers.items() for name, size in inner.items()}
    return yaml.safe_dump({"teacher": teacher, **sizes, **values}, sort_keys=False)


def hub_dataset(source: str) -> str | None:
    """Returns a source of pairs if it is a Hub id, and `None` if it names files or a folder."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not source.endswith(_FILES)
    return source if is_id and not os.path.exists(source) else None


def _find_training_sets(arguments: Mapping[str, Any]) -> list[str]:
    named = [arguments.get(name) for name in ("train_data", "train_images", "calibration_data")]
    named += arguments.get("train_texts") or []
    sources = (source.partition(":")[0] for source in named if source)  # a configuration or a column may follow
    return list(dict.fromkeys(source for source in sources if hub_dataset(source)))


def _shorten_paths(value: Any) -> Any:
    """Shortens all absolute paths in nested arguments to their last part, and drops arguments that are `None`."""
    if isinstance(value, dict):
        return {key: _shorten_paths(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_shorten_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    label, colon, path = value.rpartition(":") if value.startswith("labels:") else ("", "", value)
    return f"{label}{colon}{os.path.basename(os.path.normpath(path))}" if os.path.isabs(path) else value
