"""Compares two nested mappings of settings, and lists the entries whose values differ."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


__all__ = ["differences"]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """
    Compares two mappings of JSON values.

    Args:
        before: The first mapping.
        now: The second mapping.

    Returns:
        The entries that differ, as `{path: (value before, value now)}`. The keys of nested mappings are joined by dots
        to a path. Values are JSON texts, or `"nothing"` where the entry is missing.
    """
    left, right = (dict(_flatten(json.loads(json.dumps(settings)))) for settings in (before, now))
    texts = {
        name: tuple(json.dumps(values[name]) if name in values else "nothing" for values in (left, right))
        for name in left | right
    }
    return {name: (old, new) for name, (old, new) in texts.items() if old != new}


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the innermost values of nested dicts, and of lists of dicts, with their paths joined by dots."""
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flatten(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
