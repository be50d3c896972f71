"""How the operators of a mapping start: without data, calibrated on activations, or by a selection of the teacher."""

from clipmap_hf.starts.registry import (
    STARTS,
    Start,
    check_start,
    default_start,
    make_plan,
    named_start,
    start_mapper,
    start_of,
    uses_pairs,
)


__all__ = [
    "STARTS",
    "Start",
    "check_start",
    "default_start",
    "make_plan",
    "named_start",
    "start_mapper",
    "start_of",
    "uses_pairs",
]
