"""The embedded example: a small CLIP that was trained on emoji drawings, and the drawings; see README.md here."""

from pathlib import Path


__all__ = ["TEACHER", "TEST_PAIRS", "TRAIN_PAIRS"]

_HERE = Path(__file__).parent
TEACHER = _HERE / "teacher"
TRAIN_PAIRS = _HERE / "data" / "train.parquet"
TEST_PAIRS = _HERE / "data" / "test.parquet"
