"""Benchmarks run to their end and print a table; the sizes are too small for its numbers to mean anything."""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import clipmap_hf


REPOSITORY = Path(clipmap_hf.__file__).parents[1]
BENCHMARKS = REPOSITORY / "recipes" / "benchmarks"
# The smallest that each can be told to be (`{folder}` is a new folder), and what begins the rows of its table, or the
# lines that it prints.
RUNS = {
    "batch.py": (
        "--stage contrastive mapping distillation --student tiny --batch_size 4 --micro_batch_size 2 --plain_steps 1 "
        "--rounds 1",
        [f"| {stage} | {pairs} |" for stage in ("contrastive", "mapping", "distillation") for pairs in (2, 4)],
    ),
    "budget.py": (
        "--budgets 500k --pairs 64",
        [f"| 500k | {name} |" for name in ("keeps most", "nearest to the literature", "a quarter down", "half down")],
    ),
    "data.py": ("--images 16 --rounds 1 --batch_size 8 --shuffle_buffer 8", ["| clipmap_hf |", "| webdataset |"]),
    "decoding.py": ("--images 1 --rounds 2", ["| 500 × 375      |", "| 4000 × 3000    |"]),
    "full_size.py": ("--batch_size 2 --steps 1", ["batch 2: step 1 ", "peak memory "]),
    "heads.py": ("--batch_size 1 --rounds 1", ["| vision |     6 |", "| text   |    16 |"]),
    "initializers.py": (
        "--output_dir {folder} --parts table --sizes '1 %' --methods diagonal --seeds 0 --steps 4 --batch_size 8",
        ["| 100 % | teacher |", "| 1 % | diagonal |"],
    ),
    "labels.py": (
        "--output_dir {folder} --images 128 --steps 1 --half --losses labels",
        ["| teacher |", "| labels  |"],
    ),
    "mapping_step.py": (
        "--student tiny --batch_size 4 --micro_batch_size 2 --rounds 1",
        ["| contrastive |", "| mapping |", "mapping / contrastive: median "],
    ),
    "methods.py": (
        "--output_dir {folder} --sizes '1 %' --seeds 0 --steps 4 --batch_size 8 --methods 'TinyCLIP, manual' CLIP-Map",
        ["| TinyCLIP, manual |", "| CLIP-Map |", "| 1 % | "],
    ),
    "mope.py": ("--pairs 8 --rounds 1", ["| with reuse |", "| the whole model |", "whole / reuse: median "]),
    "packaged_sets.py": ("--output_dir {folder}", ["| digits | teacher |", "| icons  | teacher |"]),
    "resnet.py": (
        "--output_dir {folder} --sizes 1/2 --seeds 0 --teacher_steps 1 --steps 1 --batch_size 8 --pairs 16",
        [
            "| 1 | teacher | – |",
            *(
                f"| 1/2 | diagonal | {stage} |"
                for stage in ("inherited", "measured", "mapped", "distilled", "mapped, distilled")
            ),
            *(f"| 1/2 | calibrated | {stage} |" for stage in ("measured", "mapped", "distilled", "mapped, distilled")),
        ],
    ),
    "runtimes.py": (
        "--pairs 2",
        [f"| {name} " for name in ("transformers, towers", "sentence-transformers", "ONNX Runtime, q8")],
    ),
    "teacher_cache.py": (
        "--student tiny --batch_size 2 --rounds 1",
        ["| cached teacher |", "| live teacher |", "| no teacher |", "live / cached: median ", "by multiply-adds, "],
    ),
    "ternary.py": (
        "--output_dir {folder} --shapes tiny --batch_sizes 1 --rounds 1 --seeds 0 --steps 2 --rates 1e-3 --rows "
        "'teacher: trained, learned, row' 'student: trained, twn, row'",
        [
            "| tiny | and token embedding |",
            "| tiny | packed |",
            "| 64 × 64 | 4,096 |",
            "| tiny | 1 | int8 |",
            "| teacher | trained, learned, row |",
            "| student | trained, twn, row |",
        ],
    ),
    "throughput.py": ("--batch_size 1 --rounds 1", ["| ViT-B/16 |", "| base     |", "| small    |", "| tiny     |"]),
    "unpaired.py": (
        "--output_dir {folder} --images 128 --steps 1 --seeds 0 --texts own list",
        ["| own   |     manual |", "| own   | calibrated |", "| list  |        few |"],
    ),
}
# Packages that a benchmark needs beside ours, all in extras.
NEEDS = {
    "data.py": ("webdataset",),
    "packaged_sets.py": ("qtawesome", "sklearn"),
    "runtimes.py": ("onnxruntime", "onnxscript", "sentence_transformers"),
    "unpaired.py": ("wonderwords",),
}


def forget_modules(*names: str) -> None:
    """Forgets modules of the benchmarks, and those inside them, that a test has imported."""
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        sys.modules.pop(name)


def test_every_benchmark_is_run():
    assert RUNS.keys() == {path.name for path in BENCHMARKS.glob("*.py")}


@pytest.mark.recipes
@pytest.mark.parametrize("benchmark", sorted(RUNS))
def test_benchmark_prints_its_table(benchmark, tmp_path):
    missing = [name for name in NEEDS.get(benchmark, ()) if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the packages {missing}, which are not installed")
    options, beginnings = RUNS[benchmark]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    arguments = [option.format(folder=tmp_path / "output") for option in shlex.split(options)]
    command = [sys.executable, str(BENCHMARKS / benchmark), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-5000:]
    lines = result.stdout.splitlines()
    for beginning in beginnings:
        assert any(line.startswith(beginning) for line in lines), result.stdout
