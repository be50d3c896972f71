"""What a finished stage reports."""

from dataclasses import dataclass

from transformers import PreTrainedModel


__all__ = ["TrainResult"]


@dataclass
class TrainResult:
    """
    What a finished stage reports.

    Args:
        steps: Optimizer steps taken.
        pairs: Pairs trained on, repetitions counted.
        seconds: Wall-clock time of training, evaluations and checkpoints left out.
        bad_rows: Rows left out, by reason.
        skipped: Steps skipped because the loss or its gradient was not finite.
        metrics: The last evaluation.
        teacher_metrics: The teacher's on the same pairs, if it was evaluated.
        model: The student that was written.
    """

    steps: int
    pairs: int
    seconds: float
    bad_rows: dict[str, int]
    skipped: int
    metrics: dict[str, float]
    teacher_metrics: dict[str, float] | None = None
    model: PreTrainedModel | None = None
