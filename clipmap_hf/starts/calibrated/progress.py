"""Shows how far a calibrated start is: a progress bar, and a line for each layer."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

from clipmap_hf.distributed import process_index


__all__ = ["layer_progress"]


@contextmanager
def layer_progress(layers: int) -> Iterator[Callable[[str], None]]:
    """
    Shows a bar over a student's layers on stderr, unless progress bars are disabled (`disable_progress_bar` of
    transformers' logging).

    Args:
        layers: How many there are, in both towers together.

    Yields:
        A function to call with a line about each layer that is solved.
    """
    began = time.perf_counter()
    bar = logging.tqdm(total=layers, desc="Calibrated start", unit="layer", disable=process_index() > 0)

    def layer_is_done(line: str) -> None:
        if process_index() == 0:
            bar.write(f"{line}: solved after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        bar.update(1)

    try:
        yield layer_is_done
    finally:
        bar.close()
