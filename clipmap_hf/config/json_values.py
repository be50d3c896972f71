"""Turns arguments into plain values, for logs, cards and the comparison of runs."""

from dataclasses import fields, is_dataclass
from typing import Any


__all__ = ["json_values"]


def json_values(value: Any) -> Any:
    """
    Turns a value into what JSON and YAML can hold: dataclasses and mappings into dicts, functions into their names,
    and whatever else there is into its `repr`.
    """
    if isinstance(value, dict):
        return {str(key): json_values(inner) for key, inner in value.items()}
    if is_dataclass(value):
        return {f.name: json_values(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [json_values(inner) for inner in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)
