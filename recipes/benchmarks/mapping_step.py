"""
What does learning a mapping cost over training its student? Times whole optimizer steps (forward, backward, clipping,
AdamW) of the mapping stage and of the same student's contrastive stage, by turns in one process, on random weights and
data: a student of a ViT-B/16.

    python recipes/benchmarks/mapping_step.py --student small --batch_size 256 --micro_batch_size 64
"""

import argparse
import statistics
import time
from functools import partial

import torch
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import PRESETS, TowerConfig, presets_of
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.optimization import adamw
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.mapping import MappingStage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=presets_of(TowerConfig), default="small", help="preset of the student")
    parser.add_argument("--batch_size", type=int, default=256, help="pairs per step")
    parser.add_argument("--micro_batch_size", type=int, default=64, help="pairs per chunk")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each stage, after a step that is not")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    teacher = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
    mapper = start_mapper(teacher, PRESETS[arguments.student])
    stages = {
        "contrastive": ContrastiveStage(mapper.export(), logit_scale=50.0, learn_logit_scale=False),
        "mapping": MappingStage(mapper, logit_scale=50.0, learn_logit_scale=False),
    }
    steps = {}
    for name, stage in stages.items():
        if arguments.compile:
            stage.compile_encoder()
        stage.to(device).train()
        optimizer = adamw(stage, StageArguments(learning_rate=1e-6))
        steps[name] = partial(take_step, stage, optimizer, random_chunks(arguments, teacher.config, device))
    seconds = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    print(f"{arguments}, {device}, {torch.get_num_threads()} threads")
    print("| step | median (s) | from | to |\n| --- | ---: | ---: | ---: |")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} |")
    ratios = [mapping / plain for plain, mapping in zip(*seconds.values(), strict=True)]
    print(f"mapping / contrastive: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def take_step(stage: Stage, optimizer: torch.optim.Optimizer, chunks: list[dict[str, torch.Tensor]]) -> None:
    """Takes an optimizer step on all chunks."""
    stage(chunks)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(stage.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def random_chunks(arguments, config: CLIPConfig, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Makes noise and random captions of the full 77 tokens, as a loader would bring them."""
    size, tokens = arguments.micro_batch_size, (arguments.micro_batch_size, 77)
    chunks = []
    for _ in range(arguments.batch_size // size):
        input_ids = torch.randint(0, 49000, tokens)
        input_ids[:, -1] = config.text_config.eos_token_id
        chunk = {
            "pixel_values": torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8),
            "image_mean": torch.full((3,), 0.5),
            "image_std": torch.full((3,), 0.25),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        chunks.append({name: tensor.to(device) for name, tensor in chunk.items()})
    return chunks


if __name__ == "__main__":
    main()
