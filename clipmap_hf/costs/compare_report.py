"""The comparison of several models as JSON, Markdown, a picture of quality against cost, and one HTML page."""

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
from clipmap_hf.costs.latency import speedups, spread
from clipmap_hf.evaluation.retrieval import recall_columns
from clipmap_hf.files.tables import html_page, html_table, inline_png, markdown_table, scaled_column


__all__ = ["quality_plot", "write_comparison"]

Rows = Mapping[str, Measured]
_STYLE = "body { max-width: 100rem } td { white-space: nowrap } img { max-width: 100% }"


def write_comparison(folder: Path, rows: Rows, pairs: str, device: str) -> str:
    """
    Writes `results.json`, `results.md`, `quality.png` and `index.html`.

    Args:
        folder: Where to; made if it is not there.
        rows: What was measured, by name; the others' times are compared with the first's.
        pairs: What retrieval was measured on, as it is to be named.
        device: What the models ran on.

    Returns:
        The tables as Markdown.
    """
    conditions = {"pairs": pairs, **_conditions(device)}
    results = {"conditions": conditions, "models": {name: _values(one) for name, one in rows.items()}}
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
    """Mean recall against parameters, MACs, files and the time of one pair, a point for each model, as PNG."""
    from matplotlib.figure import Figure  # not a dependency: the extra `plots`
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    costs = {
        "parameters (M)": [one.cost.parameters / 1e6 for one in rows.values()],
        "MACs of a pair (G)": [one.cost.macs / 1e9 for one in rows.values()],
        "weight files (MB)": [one.file_bytes / 1e6 for one in rows.values()],
        "one pair (ms)": [spread(one.pair_milliseconds(min(_sizes(rows)))).median for one in rows.values()],
    }
    recalls = {name: 100 * one.recall["mean_recall"] for name, one in rows.items()}
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
    recalls = [one.recall for one in measured]
    files = scaled_column([one.file_bytes for one in measured], "MK")
    return [
        ["model", *rows],
        *recall_columns(recalls, ks=(1,)),
        ["mean recall", *(f"{100 * one['mean_recall']:.1f}" for one in recalls)],
        *cost_columns([one.cost for one in measured]),
        [f"weight files ({files[0]}B)", *files[1:]],
        *([f"pairs/s at batch {size}", *(_pairs_cell(rows, one, size) for one in measured)] for size in _sizes(rows)),
        ["peak memory (MB)", *(f"{one.memory.bytes / 1e6:,.0f}" for one in measured)],
        ["without libraries", *(f"{(one.memory.bytes - one.memory.libraries) / 1e6:,.0f}" for one in measured)],
    ]


def _pairs_cell(rows: Rows, one: Measured, size: int) -> str:
    """Pairs per second, and how many times as many as the first has."""
    pairs = size * 1000 / spread(one.pair_milliseconds(size)).median
    return f"{pairs:,.1f} ({_of_first(rows, one, size).median:.2f}×)"


def _of_first(rows: Rows, one: Measured, size: int):
    first = next(iter(rows.values()))
    return spread(speedups(first.pair_milliseconds(size), one.pair_milliseconds(size)))


def _time_columns(rows: Rows) -> list[list[str]]:
    """A line for each model and batch size."""
    lines = [(name, size) for size in _sizes(rows) for name in rows]
    columns = [["model", *(name for name, _ in lines)], ["batch", *(str(size) for _, size in lines)]]
    for tower, what in zip(TOWERS, ("image", "text"), strict=True):
        spreads = [spread(rows[name].milliseconds[tower, size]) for name, size in lines]
        rates = [size * 1000 / one.median for (_, size), one in zip(lines, spreads, strict=True)]
        columns += [
            [f"{what} batch (ms)", *(f"{one.median:.2f}" for one in spreads)],
            ["quartiles", *(f"{one.lower:.2f} – {one.upper:.2f}" for one in spreads)],
            [f"{what}s/s", *(f"{rate:,.1f}" for rate in rates)],
        ]
    ratios = [_of_first(rows, rows[name], size) for name, size in lines]
    return [
        *columns,
        ["pairs, times the first", *(f"{one.median:.2f}" for one in ratios)],
        ["quartiles", *(f"{one.lower:.2f} – {one.upper:.2f}" for one in ratios)],
    ]


def _notes(rows: Rows, conditions: Mapping[str, Any]) -> tuple[str, str]:
    """What stands below the main table, and below that of the times."""
    rounds = len(next(iter(next(iter(rows.values())).milliseconds.values())))
    return (
        f"Recall in percent on {conditions['pairs']}. MACs of one image, and of one text of full length. Pairs per "
        "second: a batch of images, then as many texts of full length; in brackets, how many times as many as the "
        f"first model's. Memory: the most that a process of its own had resident for batches of {max(_sizes(rows))} "
        "(on a GPU: had allocated there), and that without what was resident before the model was loaded.",
        f"Medians and quartiles of {rounds} rounds; in each, all models had their turn, and ratios are those of a "
        f"round. {conditions['device']}, {conditions['threads']} threads, torch {conditions['torch']}, transformers "
        f"{conditions['transformers']}.",
    )


def _sizes(rows: Rows) -> list[int]:
    return list(dict.fromkeys(size for one in rows.values() for _, size in one.milliseconds))


def _values(one: Measured) -> dict[str, Any]:
    """As JSON."""
    times = [
        {"tower": tower, "batch_size": size, **spread(values)._asdict(), "rounds": list(values)}
        for (tower, size), values in one.milliseconds.items()
    ]
    return {
        **one.recall,
        "parameters": one.cost.parameters,
        "parameters_without_token_embedding": one.cost.parameters_without_token_embedding,
        "vision_macs": one.cost.vision_macs,
        "text_macs": one.cost.text_macs,
        "file_bytes": one.file_bytes,
        "milliseconds": times,
        "peak_memory_bytes": one.memory.bytes,
        "libraries_memory_bytes": one.memory.libraries,
    }


def _conditions(device: str) -> dict[str, Any]:
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
