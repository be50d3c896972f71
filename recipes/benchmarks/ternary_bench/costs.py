"""What ternary weights cost: bytes in a file, memory of a process, and time, of random models of given shapes."""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from clipmap_hf.config import PRESETS, TowerConfig, presets_of, student_config
from clipmap_hf.costs.latency import milliseconds_by_turns, random_inputs, speedups, spread
from clipmap_hf.models.features import Towers
from clipmap_hf.ternary.config import PARTS, TernaryConfig
from clipmap_hf.ternary.layers import TernaryLinear, TernaryModule
from clipmap_hf.ternary.model import pack_model, set_backend, sparsity
from clipmap_hf.ternary.quantizers import ternarized


TEACHER = "ViT-B/16"
SHAPES = (TEACHER, *presets_of(TowerConfig))
BITS = 1.58  # of a trit, ideally: what the paper counts with
LAYERS, DEFAULT, ALL = ["layers"], ["layers", "token_embedding"], list(PARTS)
FILES = {
    "fp32": (None, torch.float32),
    "layers": (TernaryConfig(parts=LAYERS), torch.float32),
    "and token embedding": (TernaryConfig(parts=DEFAULT), torch.float32),
    "the same, 2 bits": (TernaryConfig(parts=DEFAULT, encoding="planar"), torch.float32),
    "the same, rest fp16": (TernaryConfig(parts=DEFAULT), torch.float16),
    "all parts": (TernaryConfig(parts=ALL), torch.float32),
    "all parts, rest fp16": (TernaryConfig(parts=ALL), torch.float16),
}
LAYER_SIZES = [(factor * width, width) for width in (64, 128, 256, 384, 512, 768) for factor in (1, 4)]
LAYER_TOKENS = (8, 24, 77, 197, 1576)
BACKENDS = ("float", "packed", "int8")  # beside the stock model, which is called by its dtype
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_GRAPHS = 64  # two towers of two models at each batch size


def shape_config(name: str) -> CLIPConfig:
    """Makes the config of a ViT-B/16, or of a preset's student of it."""
    teacher = CLIPConfig(vision_config={"patch_size": 16})
    return teacher if name == TEACHER else student_config(teacher, PRESETS[name])


def size_rows(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """Measures bytes of a shape's files, beside the paper's formula, and what share of its parameters is ternary."""
    model, whole = CLIPModel(shape_config(name)), None
    for kind, (config, dtype) in FILES.items():
        written = model if config is None else pack_model(model, config, dtype=dtype)
        written.save_pretrained(_place(folder, name, kind))
        size = (_place(folder, name, kind) / "model.safetensors").stat().st_size
        whole = whole or size
        trits = sum(prod(module.shape) for module in written.modules() if isinstance(module, TernaryModule))
        share = trits / model.num_parameters()
        yield {
            "shape": name,
            "ternary": kind,
            "weights ternary": f"{share:.2%}",
            "zeros": f"{sparsity(written):.1%}" if trits else "",
            "MB": f"{size / 1e6:.2f}",
            "of fp32": f"{whole / size:.2f}×",
            "of fp16": f"{whole / 2 / size:.2f}×",
            "by formula": f"{32 / (32 * (1 - share) + BITS * share):.2f}×",
        }


def memory_rows(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """Measures memory of processes that load the files of `size_rows` and run a pair, beyond that of the libraries."""
    whole = None
    for backend in ("fp32", *BACKENDS):
        kind = "fp32" if backend == "fp32" else "and token embedding"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found = process.submit(_memory, _place(folder, name, kind), backend).result()
        whole = whole or found
        yield {
            "shape": name,
            "backend": backend,
            **{f"{when} (MB)": f"{bytes_ / 1e6:.0f}" for when, bytes_ in found.items()},
            "after a pair, of fp32": f"{whole['after a pair'] / found['after a pair']:.1f}×",
        }


def latency_rows(
    name: str, batch_sizes: list[int], rounds: int, compile: bool, device: str, dtype: str
) -> Iterator[dict[str, str]]:
    """Times both towers by backend, all by turns; what is compiled is so for each batch size anew."""
    torch._dynamo.reset()  # all shapes share its limit of graphs, beyond which it is eager without a word
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = _GRAPHS, True
    model = CLIPModel(shape_config(name)).eval()
    models = {backend: pack_model(model, TernaryConfig(), dtype=DTYPES[dtype]) for backend in BACKENDS}
    for backend, packed in models.items():
        set_backend(packed, backend)
    models = {dtype: model.to(DTYPES[dtype]), **models}
    towers = {backend: Towers.of_model(model.to(device)) for backend, model in models.items()}
    if compile:
        towers |= {f"{backend}, compiled": _compiled(towers[backend]) for backend in (dtype, "int8")}
    runs = {
        (size, tower, backend): run
        for size in batch_sizes
        for backend, pair in towers.items()
        for tower, run in pair.passes(random_inputs(model.config, size)).items()
    }
    times = milliseconds_by_turns(runs, rounds)
    for size in batch_sizes:
        for backend in towers:
            yield {"shape": name, "batch": str(size), "backend": backend} | _tower_times(times, size, backend, dtype)


def layer_rows(rounds: int) -> Iterator[dict[str, str]]:
    """Measures how many times as fast 8-bit arithmetic makes a float layer, by its size and the number of tokens."""
    for rows, columns in LAYER_SIZES:
        module = nn.Linear(columns, rows)
        layer = TernaryLinear(module, TernaryConfig())
        layer.store(*ternarized(module.weight.detach(), "twn", "row", columns))
        layer.set_backend("int8")
        row = {"rows × columns": f"{rows} × {columns}", "weights": f"{rows * columns:,}"}
        for tokens in LAYER_TOKENS:
            runs = {timed: partial(timed, torch.randn(tokens, columns)) for timed in (module, layer)}
            times = milliseconds_by_turns(runs, rounds, seconds=0.05)
            row[f"{tokens} tokens"] = f"{spread(speedups(times[module], times[layer])).median:.1f}×"
        yield row


def _tower_times(times: Mapping, size: int, backend: str, stock: str) -> dict[str, str]:
    row = {}
    for tower in ("vision", "text"):
        ratio = spread(speedups(times[size, tower, stock], times[size, tower, backend]))
        row[f"{tower} (ms)"] = f"{spread(times[size, tower, backend]).median:.1f}"
        row[f"{tower}, of {stock}"] = f"{ratio.median:.2f}× ({ratio.lower:.2f} – {ratio.upper:.2f})"
    return row


def _compiled(towers: Towers) -> Towers:
    images, texts = (torch.compile(tower, dynamic=False) for tower in (towers.images, towers.texts))
    return Towers(images, texts, towers.device)


def _place(folder: Path, name: str, kind: str) -> Path:
    return folder / name.replace("/", "") / kind.replace(" ", "-")


def _memory(folder: Path, backend: str) -> dict[str, int]:
    """Measures in a process of its own."""
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # what importing needed at most is not counted
    model = CLIPModel.from_pretrained(folder).eval()
    if backend != "fp32":
        set_backend(model, backend)
    loaded = _resident()
    with torch.no_grad():
        for run in Towers.of_model(model).passes(random_inputs(model.config, 1)).values():
            run()
    return {
        "after loading": loaded - before,
        "after a pair": _resident() - before,
        "at most": _resident("VmHWM") - before,
        "weights in the file": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def _resident(field: str = "VmRSS") -> int:
    return 1024 * int(
        re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)[1]
    )
