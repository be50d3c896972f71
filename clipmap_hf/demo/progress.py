"""Shows on a terminal what the demo is doing, and leaves nothing behind: the table of results stays in one piece."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from transformers import TrainerCallback


__all__ = ["TransientProgress", "transient_line"]


class TransientProgress(TrainerCallback):
    """
    A progress bar that goes when the training is over, in place of the one that also prints the logs.

    Args:
        name: The student that is trained.
    """

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        """Shows the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.name, leave=False, disable=None, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        """Removes the bar."""
        self.bar.close()


@contextmanager
def transient_line(text: str) -> Iterator[None]:
    """Shows a line on a terminal while something is done."""
    with tqdm(desc=f"{text} …", bar_format="{desc}", leave=False, disable=None):
        yield
