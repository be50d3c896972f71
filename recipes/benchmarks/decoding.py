"""
How much faster are large JPEGs decoded for training, where they are scaled (`Augmentation.scaled`)? Draws JPEGs like
photos, makes views of 224 pixels of them, scaled and in full by turns, on one core, and prints a table: the views per
second, the ratio, and the mean difference of a pixel's value, from 0 to 255, between the two.

    python recipes/benchmarks/decoding.py
"""

import argparse
import random
import statistics
import time

import numpy as np
import torch
from data import photo_like

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.images import decode_image
from clipmap_hf.files.tables import markdown_table


SIZE = (224, 224)
SIDES = ((500, 375), (1000, 750), (2000, 1500), (4000, 3000))
SCALES = ((0.9, 1.0), (0.3, 1.0))  # the default crops, and those of few images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="drawn of each size")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is looked at, in another crop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [["width × height", "kB", "area of the crops", "in full (1/s)", "scaled (1/s)", "ratio", "difference"]]
    for sides in SIDES:
        generator = np.random.default_rng(0)
        files = [photo_like(generator, sides) for _ in range(arguments.images)]
        for scale in SCALES:
            rows.append([f"{sides[0]} × {sides[1]}", f"{statistics.mean(map(len, files)) / 1e3:.0f}"])
            rows[-1] += [f"{scale[0]:.0%} – {scale[1]:.0%}", *measured(files, scale, arguments.rounds)]
    print(markdown_table([[row[column] for row in rows] for column in range(len(rows[0]))]))


def measured(files: list[bytes], scale: tuple[float, float], rounds: int) -> list[str]:
    """The columns of a row."""
    seconds, differences = {True: 0.0, False: 0.0}, []
    for view in range(rounds):
        for number, content in enumerate(files):
            found = {}
            for scaled in sorted(seconds, reverse=bool(view % 2)):
                began = time.process_time()
                found[scaled] = viewed(content, Augmentation(scale, scaled=scaled), f"{number}-{view}")
                seconds[scaled] += time.process_time() - began
            differences.append(np.abs(found[True] - found[False]).mean())
    full, scaled = (rounds * len(files) / seconds[name] for name in (False, True))
    return [f"{full:.0f}", f"{scaled:.0f}", f"{scaled / full:.2f}", f"{np.mean(differences):.2f}"]


def viewed(content: bytes, augmentation: Augmentation, seed: str) -> np.ndarray:
    """A view's pixels."""
    image = decode_image(content, lambda size: augmentation.reduction(size, SIZE))
    return np.asarray(augmentation(image, SIZE, random.Random(seed)), dtype=float)


if __name__ == "__main__":
    main()
