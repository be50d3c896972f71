"""Checks numbers of dataclasses against their ranges."""

from typing import Any


__all__ = ["check_ranges"]


def check_ranges(arguments: Any, at_least_0: tuple[str, ...] = (), above_0: tuple[str, ...] = ()) -> None:
    """
    Checks fields of `arguments`; those that are `None` pass.

    Raises:
        ValueError: If a field of `at_least_0` is below 0, or one of `above_0` is not above 0.
    """
    for name in (*at_least_0, *above_0):
        value = getattr(arguments, name)
        if value is not None and not (value >= 0 if name in at_least_0 else value > 0):
            raise ValueError(f"{name}={value} must be {'at least 0' if name in at_least_0 else 'above 0'}.")
