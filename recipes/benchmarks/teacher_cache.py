"""
What does a teacher cost in distillation, live and from a cache? Times whole training steps of a student against the
embeddings of a cache on disk, against the live teacher, and of its contrastive stage, which has no teacher; by turns
in one process, on random weights and data: a ViT-B/16 teacher, and a student of it.

    python recipes/benchmarks/teacher_cache.py --student small --batch_size 32

A step is all that follows the augmentation of the images: collation (captions of the full 77 tokens, pixels, and the
lookup in the cache), forward, backward, clipping, AdamW, and reading the loss. All steps of a round have the same
pairs, every round has others. The cache was written just before, so the operating system has it in memory.
"""

import argparse
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import cycle, permutations

import datasets
import torch
from accelerate.utils import send_to_device
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from clipmap_hf.config import PRESETS, TowerConfig, presets_of, student_config
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.images import decode_image
from clipmap_hf.data.tokenizer import train_clip_tokenizer
from clipmap_hf.models.fingerprints import model_fingerprint
from clipmap_hf.teacher_cache.build import build_teacher_cache, finish_teacher_cache
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.manifest import cache_manifest
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.optimization import adamw
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage


WORDS = ("red", "blue", "old", "small", "dog", "cat", "house", "tree", "car", "street", "under", "near", "drawing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=presets_of(TowerConfig), default="small", help="preset of the student")
    parser.add_argument("--batch_size", type=int, default=32, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each kind, after a step that is not")
    parser.add_argument("--views", type=int, default=1, help="views of each image in the cache")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = random_rows(arguments.batch_size * (arguments.rounds + 1))
    collator = make_collator(rows["caption"], arguments.views)
    teacher = make_teacher(collator.tokenizer).to(device).eval()
    student = CLIPModel(student_config(teacher.config, PRESETS[arguments.student]))
    print(f"{arguments}, {device}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = make_cache(folder, teacher, rows, collator)
        print(f"cache of {len(rows)} pairs built in {time.perf_counter() - start:.0f} s\n", flush=True)
        settings = {"logit_scale": 50.0, "learn_logit_scale": False}
        steps = {
            "cached teacher": stepper(
                DistillationStage(deepcopy(student), teachers=[], **settings),
                replace(collator, teacher_cache=cache),
                device,
            ),
            "live teacher": stepper(
                DistillationStage(deepcopy(student), teachers=[teacher], **settings), collator, device
            ),
            "no teacher": stepper(ContrastiveStage(deepcopy(student), **settings), collator, device),
        }
        seconds = measure(steps, rows, collator, arguments)
    print_table(seconds)
    macs = [model_cost(model.config).macs for model in (teacher, student)]
    live = [live / cached for cached, live in zip(*(totals(seconds, name) for name in list(steps)[:2]), strict=True)]
    print(f"\nlive / cached: median {statistics.median(live):.2f} ({min(live):.2f} to {max(live):.2f})")
    print(f"by multiply-adds, (teacher + 3 students) / 3 students: {(macs[0] + 3 * macs[1]) / (3 * macs[1]):.2f}")


def measure(
    steps: dict[str, Callable], rows: datasets.Dataset, collator: PairCollator, arguments: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Measures the seconds of every step, those of its collation first, after a round that is not counted."""
    seconds, orders = {name: [] for name in steps}, cycle(permutations(steps))
    for round_ in range(arguments.rounds + 1):
        first = round_ * arguments.batch_size
        examples = []
        for row in rows.select(range(first, first + arguments.batch_size)):
            content = row["image"]["bytes"]
            examples.append(collator.view(row, content, decode_image(content), round_ % arguments.views))
        for name in next(orders):  # which step went before tells in the times
            times = steps[name](examples)
            if round_:
                seconds[name].append(times)
    return seconds


def stepper(stage: Stage, collator: PairCollator, device: torch.device) -> Callable:
    """Makes a function that takes a training step on examples, as the trainer does."""
    stage = stage.to(device).train()
    optimizer = adamw(stage, StageArguments(learning_rate=1e-6))

    def step(examples: list) -> tuple[float, float]:
        start = time.perf_counter()
        chunks = [collator.batch(examples)]
        collated = time.perf_counter()
        output = stage(send_to_device(chunks, device))
        output["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), 5.0)
        _ = [value.item() for value in (*output.values(), norm)]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return collated - start, time.perf_counter() - start

    return step


def totals(seconds: dict[str, list[tuple[float, float]]], name: str) -> list[float]:
    """Picks the seconds of the whole steps."""
    return [total for _, total in seconds[name]]


def print_table(seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Prints medians as Markdown; ratios are taken within the rounds."""
    base = totals(seconds, list(seconds)[-1])
    print("| step | median (s) | from | to | collation (ms) | ratio | from | to |")
    print("| --- |" + " ---: |" * 7)
    for name in seconds:
        times, collation = totals(seconds, name), statistics.median(first for first, _ in seconds[name])
        ratios = [own / plain for own, plain in zip(times, base, strict=True)]
        print(
            f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} | {1e3 * collation:.1f} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"
        )


def make_cache(folder: str, teacher: CLIPModel, rows: datasets.Dataset, collator: PairCollator) -> TeacherCache:
    """Makes a complete cache of all rows."""
    names = [{"weights": model_fingerprint(teacher)}]
    manifest = cache_manifest(names, collator, collator.views, {"rows": len(rows)})
    build_teacher_cache(folder, [teacher], rows, collator, manifest, batch_size=32)
    finish_teacher_cache(folder)
    return TeacherCache.open(folder)


def make_collator(captions: list[str], views: int) -> PairCollator:
    """Makes a collator as for training, with a tokenizer of 77 tokens."""
    tokenizer = train_clip_tokenizer(list(captions), vocab_size=1024, context_length=77)
    return PairCollator(tokenizer, CLIPImageProcessorPil(), augmentation=Augmentation(), views=views)


def make_teacher(tokenizer) -> CLIPModel:
    """Makes a ViT-B/16 `CLIPModel` of random weights, with OpenAI's vocabulary size."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPModel(CLIPConfig(vision_config={"patch_size": 16}, text_config=ids))


def random_rows(number: int) -> datasets.Dataset:
    """Makes undecoded noise with captions of more than 77 tokens."""
    rng, rows = random.Random(0), []
    for _ in range(number):
        image = io.BytesIO()
        Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).resize((256, 256)).save(image, "png")
        caption = " ".join(rng.choices(WORDS, k=80))
        rows.append({"image": {"bytes": image.getvalue(), "path": None}, "caption": caption})
    return datasets.Dataset.from_list(rows)


if __name__ == "__main__":
    main()
