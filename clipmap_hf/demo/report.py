"""Writes the results of the demo: a table as JSON and Markdown, and a page that shows what the models retrieve."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.images import decode_image, image_bytes
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.demo.page import retrieval_page
from clipmap_hf.evaluation.retrieval import embed_pairs, recall_at_k, recall_columns
from clipmap_hf.files.tables import markdown_table


__all__ = ["Contestant", "write_report"]

SHOWN_PAIRS = 12


@dataclass
class Contestant:
    """
    A model of the comparison.

    Args:
        model: A `CLIPModel`.
        pairs: Number of training pairs that the model saw, including repetitions; `None` for the teacher.
        seconds: Duration of the training; `None` for the teacher.
        bytes: Size of the weights in a file. By default, it is their size in fp32.
    """

    model: nn.Module
    pairs: int | None = None
    seconds: float | None = None
    bytes: int | None = None


def write_report(folder: Path, contestants: Mapping[str, Contestant], data: DataArguments, processor: Any) -> str:
    """
    Evaluates all models on `data.eval_data`, and writes `results.json`, `results.md` and `index.html`.

    Args:
        folder: Folder to write to.
        contestants: The models by name. The page shows the first two.
        data: Names the evaluation pairs, in which each image has one caption.
        processor: Tokenizer and image processor of all models.

    Returns:
        The table as Markdown.
    """
    loader = evaluation_batches(data, processor)
    batches, pairs = list(loader), loader.dataset
    embeddings = {name: embed_pairs(contestant.model, batches) for name, contestant in contestants.items()}
    shown = {name: (images[owners], texts) for name, (images, texts, owners) in list(embeddings.items())[:2]}
    results = {name: _measure(contestant, *embeddings[name]) for name, contestant in contestants.items()}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    columns = _columns(results)
    table = markdown_table(columns)
    (folder / "results.md").write_text(table + "\n", encoding="utf-8")
    page = retrieval_page(
        "CLIP-Map on emoji of an unseen style",
        columns,
        [decode_image(image_bytes(image)) for image in pairs["image"]],
        pairs[data.caption_column[0]],
        shown,
        picks=range(0, len(pairs), -(-len(pairs) // SHOWN_PAIRS)),
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return table


def _measure(contestant: Contestant, image_embeds, text_embeds, image_of_text) -> dict[str, float | int | None]:
    cost = model_cost(contestant.model.config)
    return {
        **recall_at_k(image_embeds, text_embeds, image_of_text),
        "parameters": cost.parameters,
        "parameters_without_token_embedding": cost.parameters_without_token_embedding,
        "vision_macs": cost.vision_macs,
        "text_macs": cost.text_macs,
        "bytes": contestant.bytes or cost.bytes,
        "training_pairs": contestant.pairs,
        "seconds": contestant.seconds,
    }


def _columns(results: Mapping[str, Mapping[str, float | int | None]]) -> list[list[str]]:
    rows = list(results.values())
    trained = [row["training_pairs"] is not None for row in rows]
    pairs = (str(row["training_pairs"]) if is_trained else "" for row, is_trained in zip(rows, trained, strict=True))
    seconds = (f"{row['seconds']:.0f}" if is_trained else "" for row, is_trained in zip(rows, trained, strict=True))
    return [
        ["model", *results],
        *recall_columns(rows),
        ["parameters (M)", *(f"{row['parameters'] / 1e6:.2f}" for row in rows)],
        ["MACs (M)", *(f"{row['vision_macs'] / 1e6:.2f} + {row['text_macs'] / 1e6:.2f}" for row in rows)],
        ["weights (MB)", *(f"{row['bytes'] / 1e6:.2f}" for row in rows)],
        ["training pairs", *pairs],
        ["seconds", *seconds],
    ]
