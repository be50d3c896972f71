"""Finds the values in which two nested settings differ."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


__all__ = ["differences"]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """
    The leaves in which two mappings of JSON values differ, by name; those of inner mappings are joined by dots.

    Args:
        before: One.
        now: The other.

    Returns:
        Both values as JSON, `"nothing"` where there is none.
    """
    left, right = (dict(_flat(json.loads(json.dumps(one)))) for one in (before, now))
    texts = {
        name: tuple(json.dumps(one[name]) if name in one else "nothing" for one in (left, right))
        for name in left | right
    }
    return {name: (old, new) for name, (old, new) in texts.items() if old != new}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, and of lists of dicts, with their names joined by dots."""
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
