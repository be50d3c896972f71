"""Reads times as people write them."""

import re


__all__ = ["seconds_of"]

_UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_of(limit: str | float) -> float:
    """
    Reads a time: a number of seconds, or numbers with the units h, m and s, such as `"2h"`, `"90m"` or `"1h30m"`.

    Raises:
        ValueError: If it is none of these, or not above 0.
    """
    text = str(limit).strip()
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        seconds = float(text)
    elif parts and "".join(number + unit for number, unit in parts) == text:
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"max_time={limit!r} must be seconds above 0, or a time such as 2h, 90m or 1h30m.")
    return seconds
