"""Writes a comparison of several models as JSON, Markdown and HTML, and plots quality against cost."""

import html
import io
import json
import platform
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers

from clipmap_hf.costs.compare import TOWERS, Measured
from clipmap_hf.costs.cost import cost_columns
from clipmap_hf.costs.latency import Spread, speedups, spread
from clipmap_hf.evaluation.retrieval import recall_columns
from clipmap_hf.files.extras import require
from clipmap_hf.files.tables import html_page, html_table, inline_png, markdown_table, scaled_column


__all__ = ["quality_plot", "write_comparison"]

Rows = Mapping[str, Measured]
_STYLE = "body { max-width: 100rem } td { white-space: nowrap } img { max-width: 100% }"


def write_comparison(folder: Path, rows: Rows, pairs: str, device: str) -> str:
    """
    Writes `results.json`, `results.md`, `quality.png` and `index.html`.

    Args:
        folder: Folder to write to. It is created if needed.
        rows: The measurements by name. Times are compared with those of the first model.
        pairs: Name of the data that retrieval was measured on, for the notes below the tables.
        device: Device that the models ran on.

    Returns:
        The tables as Markdown.
    """
    conditions = {"pairs": pairs, **_conditions(device)}
    results = {"conditions": conditions, "models": {name: _json_values(row) for name, row in rows.items()}}
    main, times, (note, note_on_times) = _main_columns(rows), _time_columns(rows), _notes(rows, conditions)
    picture = quality_plot(rows)
    markdown = "\n\n".join([markdown_table(main), note, markdown_table(times), note_on_times])
    body = [
        html_table(main),
        f"<p>{html.escape(note)}</p>",
        inline_png(picture, 'alt="Mean recall against cost"'),
        "<h2>Times</h2>",
        html_table(times),
        f"<p>{html.escape(note_on_times)}</p>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown + "\n", encoding="utf-8")
    (folder / "quality.png").write_bytes(picture)
    (folder / "index.html").write_text(html_page("Quality and cost", "\n".join(body), _STYLE), encoding="utf-8")
    return markdown


def quality_plot(rows: Rows) -> bytes:
    """
    Plots the mean recall against parameters, MACs, file sizes and the time of one pair. Each model is a point.

    Returns:
        The plot as PNG.
    """
    require("plots", "matplotlib")
    from matplotlib.figure import Figure  # optional, from the extra `plots`
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    costs = {
        "parameters (M)": [row.cost.parameters / 1e6 for row in rows.values()],
        "MACs of a pair (G)": [row.cost.macs / 1e9 for row in rows.values()],
        "weight files (MB)": [row.file_bytes / 1e6 for row in rows.values()],
        "one pair (ms)": [spread(row.pair_milliseconds(min(_batch_sizes(rows)))).median for row in rows.values()],
    }
    recalls = {name: 100 * row.recall["mean_recall"] for name, row in rows.items()}
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(costs), sharey=True), costs.items(), strict=True):
        for (name, recall), value, marker in zip(recalls.items(), values, cycle("osD^vP*"), strict=False):
            axes.plot(value, recall, marker, markersize=9, alpha=0.6, label=name)
        axes.set(xscale="log", xlabel=title)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="mean recall (%)", ylim=(0, 1.1 * max(*recalls.values(), 1)))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()


def _main_columns(rows: Rows) -> list[list[str]]:
    measured = list(rows.values())
    recalls = [row.recall for row in measured]
    files = scaled_column([row.file_bytes for row in measured], "MK")
    pairs = [
        [f"pairs/s at batch {size}", *(_format_rate(rows, row, size) for row in measured)]
        for size in _batch_sizes(rows)
    ]
    return [
        ["model", *rows],
        *recall_columns(recalls, ks=(1,)),
        ["mean recall", *(f"{100 * recall['mean_recall']:.1f}" for recall in recalls)],
        *cost_columns([row.cost for row in measured]),
        [f"weight files ({files[0]}B)", *files[1:]],
        *pairs,
        ["peak memory (MB)", *(f"{row.memory.bytes / 1e6:,.0f}" for row in measured)],
        ["without libraries", *(f"{(row.memory.bytes - row.memory.libraries) / 1e6:,.0f}" for row in measured)],
    ]


def _format_rate(rows: Rows, row: Measured, size: int) -> str:
    """Formats a model's pairs per second, and their ratio to those of the first model."""
    pairs = size * 1000 / spread(row.pair_milliseconds(size)).median
    return f"{pairs:,.1f} ({_speedup(rows, row, size).median:.2f}×)"


def _speedup(rows: Rows, row: Measured, size: int) -> Spread:
    """Computes how many times as fast a model is as the first model."""
    first = next(iter(rows.values()))
    return spread(speedups(first.pair_milliseconds(size), row.pair_milliseconds(size)))


def _time_columns(rows: Rows) -> list[list[str]]:
    """Makes the columns of the table of times, which has a line for each model and batch size."""
    lines = [(name, size) for size in _batch_sizes(rows) for name in rows]
    columns = [["model", *(name for name, _ in lines)], ["batch", *(str(size) for _, size in lines)]]
    for tower, item in zip(TOWERS, ("image", "text"), strict=True):
        times = [spread(rows[name].milliseconds[tower, size]) for name, size in lines]
        rates = [size * 1000 / time.median for (_, size), time in zip(lines, times, strict=True)]
        columns += [
            [f"{item} batch (ms)", *(f"{time.median:.2f}" for time in times)],
            ["quartiles", *(f"{time.lower:.2f} – {time.upper:.2f}" for time in times)],
            [f"{item}s/s", *(f"{rate:,.1f}" for rate in rates)],
        ]
    ratios = [_speedup(rows, rows[name], size) for name, size in lines]
    return [
        *columns,
        ["pairs/s, ratio to the first", *(f"{ratio.median:.2f}" for ratio in ratios)],
        ["quartiles", *(f"{ratio.lower:.2f} – {ratio.upper:.2f}" for ratio in ratios)],
    ]


def _notes(rows: Rows, conditions: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the note below the main table, and the note below the table of times."""
    rounds = len(next(iter(next(iter(rows.values())).milliseconds.values())))
    return (
        f"Recall in percent on {conditions['pairs']}. MACs are those of one image, and of one text of full length. "
        "Pairs per second are measured on a batch of images, followed by as many texts of full length; in brackets, "
        "the ratio to the first model. Peak memory is the most that was resident in a separate process with batches "
        f"of {max(_batch_sizes(rows))} (on a GPU, the most that was allocated there); without libraries, it leaves "
        "out what was resident before the model was loaded.",
        f"Medians and quartiles of {rounds} rounds. Each round measures all models in turn, and ratios are those of "
        f"the same round. {conditions['device']}, {conditions['threads']} threads, torch {conditions['torch']}, "
        f"transformers {conditions['transformers']}.",
    )


def _batch_sizes(rows: Rows) -> list[int]:
    return list(dict.fromkeys(size for row in rows.values() for _, size in row.milliseconds))


def _json_values(row: Measured) -> dict[str, Any]:
    times = [
        {"tower": tower, "batch_size": size, **spread(values)._asdict(), "rounds": list(values)}
        for (tower, size), values in row.milliseconds.items()
    ]
    return {
        **row.recall,
        "parameters": row.cost.parameters,
        "parameters_without_token_embedding": row.cost.parameters_without_token_embedding,
        "vision_macs": row.cost.vision_macs,
        "text_macs": row.cost.text_macs,
        "file_bytes": row.file_bytes,
        "milliseconds": times,
        "peak_memory_bytes": row.memory.bytes,
        "libraries_memory_bytes": row.memory.libraries,
    }


def _conditions(device: str) -> dict[str, Any]:
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
