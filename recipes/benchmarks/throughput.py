"""
How much faster are the paper's students than their teacher? Table 12 of CLIP-Map: MACs, and pairs per second of random
models, all by turns in one process, beside what the paper measured on an H800 at batch 32.

    python recipes/benchmarks/throughput.py --rounds 7
    python recipes/benchmarks/throughput.py --device cuda --rounds 20
"""

import argparse

import torch
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import PRESETS, student_config
from clipmap_hf.costs.cost import cost_columns, model_cost
from clipmap_hf.costs.latency import milliseconds_by_turns, random_inputs, speedups, spread
from clipmap_hf.files.tables import markdown_table
from clipmap_hf.models.features import Towers


TEACHER = "ViT-B/16"
PAPER = {TEACHER: "1,041", "base": "1,654 (1.6×)", "small": "2,466 (2.4×)", "tiny": "3,847 (3.8×)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="images, and texts of 77 tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    arguments = parser.parse_args()
    teacher = CLIPConfig(vision_config={"patch_size": 16})
    configs = {TEACHER: teacher, **{name: student_config(teacher, PRESETS[name]) for name in PAPER if name != TEACHER}}
    models = {name: CLIPModel(config).eval().to(arguments.device) for name, config in configs.items()}
    runs = {
        (name, tower): run
        for name, model in models.items()
        for tower, run in Towers.of_model(model).passes(random_inputs(model.config, arguments.batch_size)).items()
    }
    milliseconds = milliseconds_by_turns(runs, arguments.rounds)
    print(f"{arguments}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(markdown_table(columns(configs, milliseconds, arguments.batch_size)))


def columns(configs: dict[str, CLIPConfig], milliseconds: dict, batch_size: int) -> list[list[str]]:
    both = {
        name: [sum(towers) for towers in zip(milliseconds[name, "vision"], milliseconds[name, "text"], strict=True)]
        for name in configs
    }
    costs = [model_cost(config) for config in configs.values()]
    ratios = [spread(speedups(both[TEACHER], times)) for times in both.values()]
    return [
        ["model", *configs],
        *cost_columns(costs)[2:],
        ["by MACs", *(f"{costs[0].macs / cost.macs:.1f}×" for cost in costs)],
        *(
            [f"{tower} (ms)", *(f"{spread(milliseconds[name, tower]).median:.1f}" for name in configs)]
            for tower in ("vision", "text")
        ),
        ["pairs/s", *(f"{batch_size * 1000 / spread(times).median:,.1f}" for times in both.values())],
        ["times the teacher's", *(f"{ratio.median:.2f}× ({ratio.lower:.2f} – {ratio.upper:.2f})" for ratio in ratios)],
        ["paper: pairs/s", *PAPER.values()],
    ]


if __name__ == "__main__":
    main()
