"""A budget: the most that a student may cost, in one of four measures."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any


__all__ = ["MEASURES", "Budget"]

MEASURES = ("params", "macs", "bytes", "latency_ms")

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?) ?([kMGT]?)")


@dataclass(frozen=True)
class Budget:
    """
    What a student may cost: exactly one of four measures, a number or a text such as `"30M"`, `"2G"` or `"1.5k"`
    (decimal units).

    Args:
        params: All parameters, the token embedding included.
        macs: Multiply-accumulates of one image and one text of full length.
        bytes: Size of the fp32 weights.
        latency_ms: Milliseconds in which a batch of images and a batch of texts go through the model.
        batch_size: Of a latency: images, and texts, in a batch; 1 by default.
        device: Of a latency: what the model runs on, `cpu` by default.

    Raises:
        ValueError: If not exactly one measure is given, a size is no positive number, or batch size or device are
            given for another measure than a latency.
    """

    params: int | str | None = None
    macs: int | str | None = None
    bytes: int | str | None = None
    latency_ms: float | str | None = None
    batch_size: int | str | None = None
    device: str | None = None

    def __post_init__(self):
        given = [name for name in MEASURES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"A budget is exactly one of {list(MEASURES)}; got {given or 'none of them'}.")
        object.__setattr__(self, given[0], _number(given[0], getattr(self, given[0]), whole=given[0] != "latency_ms"))
        others = {"batch_size": self.batch_size, "device": self.device}
        if given == ["latency_ms"]:
            size = 1 if self.batch_size is None else _number("batch_size", self.batch_size, whole=True)
            object.__setattr__(self, "batch_size", size)
            object.__setattr__(self, "device", self.device or "cpu")
        elif too_many := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{too_many} are for a budget of latency_ms, not of {given[0]}; leave them out.")

    @property
    def measure(self) -> str:
        """Which of `MEASURES` it is."""
        return next(name for name in MEASURES if getattr(self, name) is not None)

    @property
    def limit(self) -> int | float:
        """The most that a student may cost."""
        return getattr(self, self.measure)

    def __str__(self) -> str:
        what = f" (batches of {self.batch_size} on {self.device})" if self.measure == "latency_ms" else ""
        return f"{self.measure}={self.limit:,}{what}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Budget":
        """
        A budget by the names of its fields.

        Raises:
            ValueError: If a name is unknown.
        """
        allowed = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(allowed)):
            raise ValueError(f"Unknown keys {unknown} for a budget; allowed are {allowed}.")
        return cls(**values)


def _number(name: str, value: Any, whole: bool) -> int | float:
    """`value`, a number or a text, if it is above 0 and, where it must be, whole."""
    found = _NUMBER.fullmatch(value.strip() if isinstance(value, str) else str(value))
    number = Decimal(found[1]) * _UNITS[found[2]] if found else 0
    if number <= 0 or (whole and number % 1):
        kind = "whole number above 0, such as 30000000 or 30M" if whole else "number above 0, such as 20"
        raise ValueError(f"{name}={value!r} must be a {kind}; units are k, M, G and T, of a thousand each.")
    return int(number) if whole else float(number)
