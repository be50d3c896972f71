"""A limit of a run's time, and how much of it is used."""

import time

import torch

from clipmap_hf.config.times import seconds_of
from clipmap_hf.distributed import gather


__all__ = ["TimeLimit"]


class TimeLimit:
    """
    Measures how much of a run's time is used, from when it is made.

    Args:
        limit: As `seconds_of` reads it; `None` for no limit.
        used: Seconds that the run has used before.
    """

    def __init__(self, limit: str | float | None, used: float = 0.0):
        self.seconds = None if limit is None else seconds_of(limit)
        self._used, self._began = used, time.monotonic()

    @property
    def used(self) -> float:
        """Seconds that the run has used."""
        return self._used + time.monotonic() - self._began

    @property
    def share(self) -> float:
        """The share of the limit that is used, at most 1; 0 without a limit."""
        return 0.0 if self.seconds is None else min(1.0, self.used / self.seconds)

    def agreed_share(self, device: torch.device) -> float:
        """Takes the largest share of all processes, so that they end together and have the same learning rate."""
        share = self.share
        return float(gather(torch.tensor([share], device=device)).max()) if self.seconds is not None else share
