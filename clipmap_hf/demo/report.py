"""The demo's outcome: one table as JSON and Markdown, and a page of what the models retrieve."""

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
        pairs: Training pairs it saw, repetitions counted; `None` for a model that was given.
        seconds: Time of its training.
        bytes: Of its weights in a file; by default in fp32.
    """

    model: nn.Module
    pairs: int | None = None
    seconds: float | None = None
    bytes: int | None = None


def write_report(folder: Path, contestants: Mapping[str, Contestant], data: DataArguments, processor: Any) -> str:
    """
    Evaluates all models on `data.eval_data`, writes `results.json`, `results.md` and `index.html`, and returns the
    table as Markdown.

    Args:
        folder: Where to.
        contestants: Models by name; the first two are shown on the page.
        data: Names the evaluation pairs, each image with one caption.
        processor: Tokenizer and image processor of all models.
    """
    loader = evaluation_batches(data, processor)
    batches, pairs = list(loader), loader.dataset
    embeddings = {name: embed_pairs(one.model, batches)[:2] for name, one in contestants.items()}
    results = {name: _measure(one, *embeddings[name]) for name, one in contestants.items()}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    columns = _columns(results)
    table = markdown_table(columns)
    (folder / "results.md").write_text(table + "\n", encoding="utf-8")
    page = retrieval_page(
        "CLIP-Map on emoji of an unseen style",
        columns,
        [decode_image(image_bytes(image)) for image in pairs["image"]],
        pairs[data.caption_column[0]],
        dict(list(embeddings.items())[:2]),
        picks=range(0, len(pairs), -(-len(pairs) // SHOWN_PAIRS)),
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return table


def _measure(contestant: Contestant, image_embeds, text_embeds) -> dict[str, float | int | None]:
    cost = model_cost(contestant.model.config)
    return {
        **recall_at_k(image_embeds, text_embeds),
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
    pairs = (str(row["training_pairs"]) if had else "" for row, had in zip(rows, trained, strict=True))
    seconds = (f"{row['seconds']:.0f}" if had else "" for row, had in zip(rows, trained, strict=True))
    return [
        ["model", *results],
        *recall_columns(rows),
        ["parameters (M)", *(f"{row['parameters'] / 1e6:.2f}" for row in rows)],
        ["MACs (M)", *(f"{row['vision_macs'] / 1e6:.2f} + {row['text_macs'] / 1e6:.2f}" for row in rows)],
        ["weights (MB)", *(f"{row['bytes'] / 1e6:.2f}" for row in rows)],
        ["training pairs", *pairs],
        ["seconds", *seconds],
    ]
