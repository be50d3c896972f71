"""
What does reuse save in MoPE-CLIP's leave-one-out? Measures the pruning errors of the embedded teacher by turns as
the package does (the other tower's embeddings are kept, and of the module's own tower what lies before its layer) and
by the whole model for each module; the errors must agree. Prints them as a heat map.

    python recipes/benchmarks/mope.py --pairs 512
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.demo import TEACHER, TRAIN_PAIRS
from clipmap_hf.evaluation.retrieval import recall_at_k
from clipmap_hf.models.features import encode_images, encode_texts
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.selection.criteria import taylor
from clipmap_hf.starts.selection.heat_map import heat_map
from clipmap_hf.starts.selection.mope import GROUPS, PruningErrors, neuron_groups, pruning_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512, help="pairs to measure recall on")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each of which both ways are timed")
    arguments = parser.parse_args()
    teacher, processor = load_model(str(TEACHER)), load_processor(str(TEACHER), backend="pil")
    batches = list(CalibrationPairs(load_pairs(str(TRAIN_PAIRS)), processor, arguments.pairs))
    estimates = taylor(teacher, batches, 0)
    neurons = {name: getattr(estimates, name).neurons for name in ("vision", "text")}
    ways = {"with reuse": pruning_errors, "the whole model": by_whole_models}
    seconds, errors = {name: [] for name in ways}, {}
    for _ in range(arguments.rounds):
        for name, measure in ways.items():
            began = time.perf_counter()
            errors[name] = measure(teacher, batches, neurons)
            seconds[name].append(time.perf_counter() - began)
    for tower in neurons:
        for part in ("heads", "groups", "layers"):
            reused, whole = (getattr(found[tower], part) for found in errors.values())
            torch.testing.assert_close(reused, whole, atol=2 / arguments.pairs, rtol=0)  # a rank may turn by rounding
    print(heat_map(errors["with reuse"]) + "\n")
    print("| way | median (s) | from | to |\n|---|---:|---:|---:|")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.1f} | {min(taken):.1f} | {max(taken):.1f} |")
    ratios = [whole / reused for reused, whole in zip(*seconds.values(), strict=True)]
    print(f"whole / reuse: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


@torch.no_grad()
def by_whole_models(teacher: nn.Module, batches: list, neurons: dict[str, torch.Tensor]) -> dict[str, PruningErrors]:
    """Does what `pruning_errors` does, with all batches through both towers for each module."""

    def recall() -> float:
        images = torch.cat([encode_images(teacher, batch["pixel_values"]) for batch in batches])
        texts = torch.cat([encode_texts(teacher, batch["input_ids"], batch["attention_mask"]) for batch in batches])
        recalls = recall_at_k(images, texts)
        return sum(recalls.values()) / len(recalls)

    whole, found = recall(), {}
    for name, importance in neurons.items():
        tower, groups = Tower(teacher, name), neuron_groups(importance, GROUPS)
        heads, groups_lost, layers = [], [], []
        for layer, group_of in zip(tower.layers, groups, strict=True):
            out_proj, fc2, width = layer.self_attn.out_proj, layer.mlp.fc2, layer.self_attn.head_dim
            of_head = torch.arange(out_proj.in_features) // width
            count = tower.config.num_attention_heads
            heads.append([whole - without(recall, (out_proj.weight, of_head == head)) for head in range(count)])
            groups_lost.append([whole - without(recall, (fc2.weight, group_of == group)) for group in range(GROUPS)])
            everything = [(linear.weight, slice(None)) for linear in (out_proj, fc2)]
            everything += [(linear.bias[None], slice(None)) for linear in (out_proj, fc2)]
            layers.append(whole - without(recall, *everything))
        found[name] = PruningErrors(
            *(torch.tensor(lost, dtype=torch.float64) for lost in (heads, groups_lost, layers))
        )
    return found


def without(recall: Callable[[], float], *columns: tuple[torch.Tensor, torch.Tensor | slice]) -> float:
    """Measures recall with some columns of weights at zero, which are put back."""
    kept = [weight[:, chosen].clone() for weight, chosen in columns]
    for weight, chosen in columns:
        weight[:, chosen] = 0
    value = recall()
    for (weight, chosen), before in zip(columns, kept, strict=True):
        weight[:, chosen] = before
    return value


if __name__ == "__main__":
    main()
