"""
Compares CLIP models, folders or Hub ids, by quality, size, time and memory.

It measures retrieval, parameters, MACs, weight files, times of both towers, and peak memory.

    python recipes/compare.py teacher student me/other --eval_data test.parquet --output_dir comparison
    python recipes/compare.py student --runtimes transformers onnx onnx_quantized --eval_data test.parquet

Writes the tables (`results.md`, `results.json`), quality against cost (`quality.png`) and both as `index.html`.
Times are taken by turns, so that their ratios hold on a busy machine; the first model's are the reference.
"""

import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

from clipmap_hf.cli.parsing import parse_arguments
from clipmap_hf.files.extras import require


@dataclass
class CompareArguments:
    eval_data: str = field(metadata={"help": "Hub id, image folder, or glob of parquet files or webdataset tars."})
    models: list[str] = field(metadata={"help": "Folders or Hub ids of CLIP models; `--models` may be left out."})
    runtimes: list[str] = field(
        default_factory=lambda: ["transformers"],
        metadata={"help": "What runs them: transformers, or exports in `onnx/`: onnx, onnx_int8, onnx_quantized."},
    )
    eval_split: str = field(
        default="train", metadata={"help": "Split of `eval_data` (plain files have only `train`)."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(default="caption", metadata={"help": "Column of the captions."})
    image_backend: Literal["pil", "torchvision"] = field(default="pil", metadata={"help": "Of the image processor."})
    device: str = field(default="cpu", metadata={"help": "What the models run on, such as cpu or cuda."})
    rounds: int = field(default=5, metadata={"help": "Measurements of each time."})
    output_dir: str = field(default="comparison", metadata={"help": "Folder for the results."})

    def __post_init__(self):
        require("plots", "matplotlib")
        if self.runtimes != ["transformers"]:
            require("onnx", "onnxruntime")


def main() -> None:
    argv = sys.argv[1:]
    models = list(takewhile(lambda word: not word.startswith("-"), argv))
    if models:
        sys.argv[1:] = ["--models", *models, *argv[len(models) :]]
    (arguments,) = parse_arguments(CompareArguments, description=__doc__)
    from clipmap_hf.costs.compare import contenders, measure
    from clipmap_hf.costs.compare_report import write_comparison
    from clipmap_hf.data.evaluation_pairs import evaluation_pairs
    from clipmap_hf.models.loading import load_processor

    rows = contenders(arguments.models, arguments.runtimes)
    columns = {name: getattr(arguments, name) for name in ("image_column", "caption_column")}

    def pairs(folder: Path):
        processor = load_processor(str(folder), backend=arguments.image_backend)
        return evaluation_pairs(arguments.eval_data, processor, split=arguments.eval_split, **columns)

    measured = measure(rows, pairs, arguments.rounds, arguments.device)
    print(write_comparison(Path(arguments.output_dir), measured, arguments.eval_data, arguments.device))


if __name__ == "__main__":
    main()
