"""
A small CLIP with a ResNet, pretrained on the embedded pairs as the embedded teacher was, and students of about a half
and a quarter of its parameters, tested on a style that no model was trained on.

    python recipes/benchmarks/resnet.py --output_dir resnet                           # all, three seeds
    python recipes/benchmarks/resnet.py --output_dir resnet --sizes 1/2 --seeds 0     # one row after another

Prints recall in percent, image to text / text to image, of each student: untrained, with the BatchNorms' statistics
inherited or measured; after mapping alone, as in the paper's Table 1; after distillation of the measured start; and
after both stages. The start `calibrated` sets the statistics itself, so it has no row of inherited ones. After an
interruption, the same command goes on.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import set_seed
from study.cells import cell_path, made_once
from study.recall import mean_recall, recall_columns
from study.tables import markdown
from transformers.utils import logging

from clipmap_hf import (
    ClipMapCompressor,
    ClipMapConfig,
    DistillationArguments,
    DistillationTrainer,
    MappingArguments,
    MappingTrainer,
    PretrainingArguments,
    PretrainingTrainer,
    evaluate_retrieval,
)
from clipmap_hf.costs.cost import parameter_count
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.models.clip_resnet.config import CLIPResNetConfig
from clipmap_hf.models.clip_resnet.model import CLIPResNetModel
from clipmap_hf.models.loading import load_config, load_model, load_processor


VISION = {"width": 16, "layers": [1, 2, 2, 1], "head_width": 32, "image_size": 64}
STARTS = ("diagonal", "magnitude", "calibrated")
STAGES = ("inherited", "measured", "mapped", "distilled", "mapped, distilled")
READING = {"keyword_column": ["keywords"], "caption_sampling": "random", "disable_tqdm": True}
AUGMENTED = {"crop_scale": [0.5, 1.0], "rotation": 10.0, "color_jitter": 0.3, "grayscale": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of teacher and results")
    parser.add_argument("--teacher_steps", type=int, default=2600, help="of 256 pairs, of the teacher")
    parser.add_argument("--steps", type=int, default=250, help="of each stage of a student")
    parser.add_argument("--batch_size", type=int, default=128, help="pairs per step of a stage")
    parser.add_argument("--pairs", type=int, default=2048, help="calibration pairs of starts and BatchNorms")
    parser.add_argument("--sizes", nargs="+", default=["1/2", "1/4"], help="shares of the teacher's parameters")
    parser.add_argument(
        "--starts", nargs="+", choices=STARTS, default=["diagonal", "calibrated"], help="of the operators"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    teacher = pretrained(arguments)
    count = parameter_count(load_config(str(teacher)))
    recall = made_once(arguments.output_dir / "cells" / "teacher.json", lambda _: recall_of(load_model(str(teacher))))
    rows = [row("1", "teacher", "", count, [recall])]
    for size in arguments.sizes:
        for start in arguments.starts:
            cells = [made_of(arguments, teacher, size, start, seed) for seed in arguments.seeds]
            for stage in (stage for stage in STAGES if stage in cells[0]):
                rows.append(row(size, start, stage, cells[0]["parameters"], [cell[stage] for cell in cells]))
    print(markdown(rows))


def pretrained(arguments: argparse.Namespace) -> Path:
    """The folder of the teacher, which is trained first if need be."""
    folder = arguments.output_dir / f"teacher-{arguments.teacher_steps}"
    if not (folder / "config.json").exists():
        text = load_config(str(TEACHER)).text_config.to_dict()
        set_seed(0)
        model = CLIPResNetModel(CLIPResNetConfig(vision_config=VISION, text_config=text, projection_dim=128))
        numbers = {"max_steps": arguments.teacher_steps, "batch_size": 256, "learning_rate": 1e-3}
        numbers |= {"logit_scale": 14.3, "learn_logit_scale": True}
        args = PretrainingArguments(str(folder), **numbers, **READING, **AUGMENTED)
        trainer = PretrainingTrainer(model, args, str(TRAIN_PAIRS), processing_class=load_processor(str(TEACHER)))
        trainer.train()
    return folder


def made_of(arguments: argparse.Namespace, teacher: Path, size: str, start: str, seed: int) -> dict[str, Any]:
    """What a student of a size reaches at each of `STAGES`."""
    numbers = {name: getattr(arguments, name) for name in ("teacher_steps", "steps", "batch_size", "pairs")}
    settings = numbers | {"size": size, "start": start, "seed": seed}
    name = f"{size.replace('/', '-')}-{start}-{seed}"
    path = cell_path(arguments.output_dir / "cells", name, settings)
    return made_once(path, lambda work: stages(arguments, teacher, size, start, seed, work), described)


def stages(
    arguments: argparse.Namespace, teacher: Path, size: str, start: str, seed: int, work: Path
) -> dict[str, Any]:
    """Makes a student in all ways; folders of its training lie in `work`."""
    params = int(Fraction(size) * parameter_count(load_config(str(teacher))))

    def started(statistics: str) -> ClipMapCompressor:
        config = ClipMapConfig(budget={"params": params}, initializer=start, norm_statistics=statistics, seed=seed)
        pairs = {"calibration_data": str(TRAIN_PAIRS), "calibration_pairs": arguments.pairs}
        return ClipMapCompressor.from_pretrained(str(teacher), config, **(pairs if statistics == "measured" else {}))

    def distilled(student: Any, name: str) -> dict[str, float]:
        args = DistillationArguments(str(work / name), learning_rate=1e-3, **training)
        DistillationTrainer(student, str(teacher), args, str(TRAIN_PAIRS)).train()
        return recall_of(load_model(str(work / name)))

    training = READING | {"max_steps": arguments.steps, "batch_size": arguments.batch_size, "seed": seed}
    training["crop_scale"] = [0.7, 1.0]
    cell = {} if start == "calibrated" else {"inherited": recall_of(started("inherited").export())}
    compressor = started("measured")
    cell |= {"measured": recall_of(compressor.export()), "parameters": parameter_count(compressor.config)}
    cell["distilled"] = distilled(compressor.export(), "distilled")
    MappingTrainer(compressor, MappingArguments(str(work / "mapped"), **training), str(TRAIN_PAIRS)).train()
    cell["mapped"] = recall_of(compressor.export())
    return cell | {"mapped, distilled": distilled(compressor.export(), "both")}


def recall_of(model: Any) -> dict[str, float]:
    """Recall on the embedded test pairs."""
    return evaluate_retrieval(model, str(TEST_PAIRS), processor=load_processor(str(TEACHER)))


def described(cell: dict[str, Any]) -> str:
    """The mean recall@5 of each stage, in percent."""
    return ", ".join(f"{stage} {100 * mean_recall(cell[stage], 5):.1f}" for stage in STAGES if stage in cell)


def row(size: str, start: str, stage: str, parameters: int, recalls: list[dict[str, float]]) -> dict[str, str]:
    """A row of the table."""
    values = {"size": size, "start": start, "student": stage or "–", "parameters (k)": f"{parameters / 1e3:,.0f}"}
    return values | recall_columns(recalls)


if __name__ == "__main__":
    main()
