"""Reports the results of the demo: rows of a table as they are ready, then the same as JSON, Markdown and a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.images import decode_image, image_bytes
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.demo.charts import Series, bars, learning_curves
from clipmap_hf.demo.page import retrieval_page
from clipmap_hf.evaluation.retrieval import embed_pairs, recall_at_k, recall_columns
from clipmap_hf.files.tables import markdown_header, markdown_row


__all__ = ["Contestant", "Report", "learning_curve"]

Result = Mapping[str, float | int | None]

SHOWN_PAIRS = 6


@dataclass
class Contestant:
    """
    A model of the comparison.

    Args:
        model: A `CLIPModel`.
        pairs: Number of training pairs that the model saw, including repetitions; `None` for the teacher.
        seconds: Duration of the training; `None` for the teacher.
        bytes: Size of the weights in a file. By default, it is their size in fp32.
        curve: Recall@10 during training, as `learning_curve` gives it.
        after: Name of the model whose training this one's goes on from, if it is one of the comparison.
    """

    model: nn.Module
    pairs: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    curve: Sequence[tuple[int, float]] = ()
    after: str | None = None


class Report:
    """
    Evaluates models one after another, and reports the results.

    Args:
        folder: Folder to write to.
        names: Names of all models that will be added; they decide how wide the table is.
        data: Names the evaluation pairs in `eval_data`, in which each image has one caption.
        processor: Tokenizer and image processor of all models.
    """

    def __init__(self, folder: Path, names: Sequence[str], data: DataArguments, processor: Any):
        loader = evaluation_batches(data, processor)
        self.folder, self.data = folder, data
        self.batches, self.pairs = list(loader), loader.dataset
        self.widths = [max(map(len, ["model", *names])), 13, 14, 10, 6, 7, 7]
        self.results: dict[str, dict[str, float | int | None]] = {}
        self.contestants: dict[str, Contestant] = {}
        self.embeddings: dict[str, tuple] = {}

    @property
    def header(self) -> str:
        """The first lines of the table."""
        header = ["model", "R@1 i→t / t→i", "R@10 i→t / t→i", "params (M)", "MB", "pairs", "seconds"]
        return markdown_header(header, self.widths)

    @property
    def table(self) -> str:
        """The table so far, as Markdown."""
        return "\n".join([self.header, *map(self._row, self.results)])

    def add(self, name: str, contestant: Contestant) -> str:
        """
        Evaluates a model.

        Args:
            name: Its name.
            contestant: The model.

        Returns:
            Its row of the table.
        """
        images, texts, owners = embed_pairs(contestant.model, self.batches)
        self.results[name] = _measure(contestant, images, texts, owners)
        self.contestants[name], self.embeddings[name] = contestant, (images[owners], texts)
        return self._row(name)

    def write(self, shown: Sequence[str]) -> Path:
        """
        Writes `results.json`, `results.md` and `index.html`.

        Args:
            shown: The models whose retrieval the page shows. The first is the one that the others are compared with.

        Returns:
            The path of the page.
        """
        (self.folder / "results.json").write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
        (self.folder / "results.md").write_text(self.table + "\n", encoding="utf-8")
        page = retrieval_page(
            [decode_image(image_bytes(image)) for image in self.pairs["image"]],
            self.pairs[self.data.caption_column[0]],
            {name: self.embeddings[name] for name in shown},
            picks=range(0, len(self.pairs), -(-len(self.pairs) // SHOWN_PAIRS)),
            lead=_lead({name: self.results[name] for name in shown}),
            charts=[self._curves(), self._sizes()],
            table=_columns(self.results),
        )
        (self.folder / "index.html").write_text(page, encoding="utf-8")
        return self.folder / "index.html"

    def _row(self, name: str) -> str:
        result = self.results[name]
        (_, first), (_, tenth) = recall_columns([result], ks=(1, 10))
        cells = [name, first, tenth, f"{result['parameters'] / 1e6:.2f}", f"{result['bytes'] / 1e6:.2f}"]
        return markdown_row([*cells, *_trained(result)], self.widths)

    def _curves(self) -> str:
        """Draws recall@10 against the pairs seen. A student that goes on from another begins where that one is."""
        series = []
        for name, contestant in self.contestants.items():
            if contestant.pairs is None or any(other.after == name for other in self.contestants.values()):
                continue
            ends = [self._point(one) for one in (contestant.after, name) if one is not None]
            series.append(Series(name, sorted({**dict(contestant.curve), **dict(ends)}.items())))
        levels = {
            name: recall_at_10(self.results[name]) for name, one in self.contestants.items() if one.pairs is None
        }
        return learning_curves(series, levels)

    def _point(self, name: str) -> tuple[int, float]:
        return self.contestants[name].pairs, recall_at_10(self.results[name])

    def _sizes(self) -> str:
        """Draws the size and the recall of each model as bars."""
        sizes = [result["bytes"] / 1e6 for result in self.results.values()]
        recalls = [recall_at_10(result) for result in self.results.values()]
        return bars(list(self.results), {"weights (MB)": sizes, "recall@10 (%)": [100 * one for one in recalls]})


def recall_at_10(result: Result, prefix: str = "") -> float:
    """The mean of both directions."""
    return (result[f"{prefix}image_to_text_recall@10"] + result[f"{prefix}text_to_image_recall@10"]) / 2


def learning_curve(folder: Path, seen: int) -> list[tuple[int, float]]:
    """
    Reads the evaluations that a training has logged.

    Args:
        folder: Output folder of the training.
        seen: Number of pairs that the student saw before it.

    Returns:
        For each evaluation the number of pairs, and recall@10 as the mean of both directions.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(seen + line["pairs"], recall_at_10(line, "eval_")) for line in lines if "eval_mean_recall" in line]


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


def _trained(result: Result) -> list[str]:
    """Cells that say on how many pairs and how long a student was trained; empty for the teacher."""
    pairs, seconds = result["training_pairs"], result["seconds"]
    return ["" if pairs is None else f"{pairs:,}", "" if seconds is None else f"{seconds:.0f}"]


def _columns(results: Mapping[str, Result]) -> list[list[str]]:
    rows = list(results.values())
    pairs, seconds = zip(*map(_trained, rows), strict=True)
    return [
        ["model", *results],
        *recall_columns(rows),
        ["parameters (M)", *(f"{row['parameters'] / 1e6:.2f}" for row in rows)],
        ["MACs (M)", *(f"{row['vision_macs'] / 1e6:.2f} + {row['text_macs'] / 1e6:.2f}" for row in rows)],
        ["weights (MB)", *(f"{row['bytes'] / 1e6:.2f}" for row in rows)],
        ["training pairs", *pairs],
        ["seconds", *seconds],
    ]


def _lead(shown: Mapping[str, Result]) -> list[str]:
    """Says of each model whose retrieval is shown how large and how good it is."""
    return [
        f"{name[0].upper()}{name[1:]}: {result['parameters'] / 1e6:.2f} M parameters, {result['bytes'] / 1e6:.2f} MB. "
        f"{100 * recall_at_10(result):.0f} % of what is looked for is among the first ten."
        for name, result in shown.items()
    ]
