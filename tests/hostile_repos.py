"""Model folders that nobody should load; run as a script, loads each within bounds of memory and time."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


SPARE_MEMORY = 500 * 2**20  # bytes beyond what a good model of the same file needs
WEIGHTS = "model.safetensors"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Changes values of config.json; `vision__name` is one of the vision tower's."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            tower, _, inner = name.partition("__")
            values, key = (config[f"{tower}_config"], inner) if inner else (config, name)
            values[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(**changes: Any) -> Callable[[Path], None]:
    """Replaces tensors, dots in their names written as `__`; `None` leaves one out."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: one for name, one in tensors.items() if one is not None}, folder / WEIGHTS, {"format": "pt"})

    return edit


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def shards_outside(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), "../elsewhere.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def shards_missing(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def own_code(folder: Path) -> None:
    edit_config(auto_map={"AutoModel": "modeling.Model"})(folder)
    (folder / "modeling.py").write_text("raise SystemExit('this code must not run')\n")


def own_code_of_a_new_type(folder: Path) -> None:
    edit_config(model_type="new", auto_map={"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"})(folder)
    (folder / "modeling.py").write_text("raise SystemExit('this code must not run')\n")


def cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100_000])


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")


# What is done to a good folder, and what the error says.
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights only": (only_pickled, "pickled weights are never loaded"),
    "a billion layers": (edit_config(vision__num_hidden_layers=10**9), "describes 1,000,000,000 layers"),
    "a million layers": (edit_config(text__num_hidden_layers=10**6), "describes 1,000,000 layers"),
    "a huge width": (edit_config(vision__hidden_size=2**30), r"at least .* parameters, the weights hold"),
    "a huge vocabulary": (edit_config(text__vocab_size=10**12), r"at least .* parameters, the weights hold"),
    "a huge image": (edit_config(vision__image_size=10**7), r"at least .* parameters, the weights hold"),
    "a huge patch": (edit_config(vision__patch_size=10**7), r"at least .* parameters, the weights hold"),
    "a huge context": (edit_config(text__max_position_embeddings=10**12), r"at least .* parameters, the weights hold"),
    "a huge embedding": (
        edit_config(projection_dim=10**12, vision__projection_dim=10**12, text__projection_dim=10**12),
        r"at least .* parameters, the weights hold",
    ),
    "a huge embedding, said once": (edit_config(projection_dim=10**12), r"at least .* parameters, the weights hold"),
    "many token types": (
        edit_config(text__type_vocab_size=10**12, model_type="chinese_clip"),
        "parameters, the weights hold",
    ),
    "no towers": (edit_config(model_type="bert", vision_config=None, text_config=None, vocab_size=10**12), "no CLIP"),
    "no number": (edit_config(text__num_hidden_layers="three"), "is not valid"),
    "negative layers": (edit_config(text__num_hidden_layers=-1), "not part of the model"),
    "own code": (own_code, "names code of its own"),
    "own code of a new type": (own_code_of_a_new_type, "custom code|trust_remote_code"),
    "a tensor of another shape": (
        edit_weights(visual_projection__weight=torch.zeros(32, 60)),
        r"of another shape: .*visual_projection\.weight",
    ),
    "a tensor too many": (edit_weights(more=torch.zeros(1)), r"not part of the model: \['more'\]"),
    "a tensor too few": (edit_weights(logit_scale=None), r"missing: \['logit_scale'\]"),
    "shards outside": (shards_outside, r"listed to lie outside of it, in \['\.\./elsewhere\.safetensors'\]"),
    "shards missing": (shards_missing, "lacks .*model-00001-of-00002.safetensors"),
    "weights cut off": (cut_off, "incomplete metadata"),
    "a huge header": (huge_header, "header"),
}


def main() -> None:
    """Loads `sys.argv[1]`, which is good, then the others within bounds; prints a JSON line for each."""
    import resource

    from clipmap_hf.models.loading import load_model

    good, *others = sys.argv[1:]
    load_model(good)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, used + SPARE_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    for source in others:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_model(source)
            error = "it was loaded"
        except Exception as caught:  # what it is, the test judges
            error = f"{type(caught).__name__}: {caught}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"source": source, "error": error, "grown_kb": grown}), flush=True)


if __name__ == "__main__":
    main()
