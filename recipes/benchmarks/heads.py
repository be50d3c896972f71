"""
What do many narrow heads cost in time? Random towers of half the width of a ViT-B/16, with fewer or more heads. Their
multiply-adds are equal, but each head has a softmax. All are measured by turns in one process.

    python recipes/benchmarks/heads.py --rounds 7
    python recipes/benchmarks/heads.py --device cuda --rounds 20
"""

import argparse

import torch
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig, student_config
from clipmap_hf.costs.latency import milliseconds_by_turns, random_inputs, speedups, spread
from clipmap_hf.files.tables import markdown_table
from clipmap_hf.models.features import Towers


WIDTHS = {"vision": 384, "text": 256}
CHANNELS = (64, 32, 16)  # of a head; the first are as wide as the teacher's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="images, and texts of 77 tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    arguments = parser.parse_args()
    teacher = CLIPConfig(vision_config={"patch_size": 16})
    runs = {}
    for channels in CHANNELS:
        towers = {name: TowerConfig(width, num_attention_heads=width // channels) for name, width in WIDTHS.items()}
        model = CLIPModel(student_config(teacher, ClipMapConfig(**towers))).eval().to(arguments.device)
        passes = Towers.of_model(model).passes(random_inputs(model.config, arguments.batch_size))
        runs |= {(tower, channels): run for tower, run in passes.items()}
    times = milliseconds_by_turns(runs, arguments.rounds)
    print(f"{arguments}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    rows = [["tower"], ["heads"], ["channels of a head"], ["ms"], ["times as long as with whole heads"]]
    for (tower, channels), found in times.items():
        ratio = spread(speedups(found, times[tower, CHANNELS[0]]))
        values = (tower, WIDTHS[tower] // channels, channels, f"{spread(found).median:.1f}")
        for row, value in zip(
            rows, (*values, f"{ratio.median:.2f} ({ratio.lower:.2f} – {ratio.upper:.2f})"), strict=True
        ):
            row.append(str(value))
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
