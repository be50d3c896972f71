"""
What ternary weights cost and keep: bytes on disk, memory of processes, time by backend, of random models of the shapes
ViT-B/16, base, small and tiny; and retrieval of the embedded teacher and a student, by quantizer, granularity and
training, over seeds.

    python recipes/benchmarks/ternary.py --output_dir ternary                                     # all of it, hours
    python recipes/benchmarks/ternary.py --output_dir ternary --parts latency --shapes ViT-B/16 --compile

`of fp32` and `of fp16` say how many times as small or as fast. `by formula` is 32 bits against 1.58 for each ternary
weight and 32 for the others, without levels. Times of a table are taken by turns. Memory is that of a process beyond
what its libraries take. Models are trained on the embedded pairs and tested on an unseen style; rates are the best of
`--rates` in trials a third as long, on a style that is held out (but known to the teacher). A ternary student is
the float student trained on, for as many steps again. What was trained lies in `cells/`, not to be trained again.
"""

import argparse
from itertools import chain
from pathlib import Path

import datasets
import torch
from study.tables import markdown
from ternary_bench.costs import DTYPES, SHAPES, latency_rows, layer_rows, memory_rows, size_rows
from ternary_bench.quality import ROWS, quality_rows
from transformers.utils import logging

from clipmap_hf.files.atomic import write_atomically


PARTS = ("sizes", "memory", "layers", "latency", "quality")
RATES = [5e-4, 1e-3, 2e-3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the tables and of what they need")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables; memory needs those of sizes")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="of random models")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32], help="of times")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each time")
    parser.add_argument("--device", default="cpu", help="what times are taken on: cpu, cuda, …")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all that is not ternary, in times")
    parser.add_argument("--compile", action="store_true", help="time compiled towers as well")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of trained rows")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the table of quality")
    parser.add_argument("--steps", type=int, default=250, help="of 128 pairs")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates to choose from by row")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder, shapes = arguments.output_dir, arguments.shapes
    timing = {name: getattr(arguments, name) for name in ("batch_sizes", "rounds", "compile", "device", "dtype")}
    tables = {
        "sizes": lambda: chain(*(size_rows(name, folder) for name in shapes)),
        "memory": lambda: chain(*(memory_rows(name, folder) for name in shapes)),
        "layers": lambda: layer_rows(arguments.rounds),
        "latency": lambda: chain(*(latency_rows(name, **timing) for name in shapes)),
        "quality": lambda: quality_rows(folder, arguments.rows, arguments.steps, arguments.rates, arguments.seeds),
    }
    print(f"{arguments}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for part in arguments.parts:
        table = markdown(list(tables[part]()))
        print(f"\n## {part}\n\n{table}", flush=True)
        write_atomically(folder / f"{part}.md", (table + "\n").encode())


if __name__ == "__main__":
    main()
