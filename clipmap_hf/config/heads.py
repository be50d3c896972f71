"""How many heads a tower of a student has: what is asked for, or what a rule says."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["HEAD_RULES", "check_head_count", "head_count", "head_width", "shown_heads"]

HEAD_RULES = ("whole", "narrow", "all")

_NARROWEST = 16  # channels of a head, unless the teacher's are narrower
_STEP = 8  # of which a narrower head has a multiple, for the sake of kernels


def head_width(tower: PretrainedConfig) -> int:
    """Returns the channels of a tower's heads."""
    return tower.hidden_size // tower.num_attention_heads


def head_count(width: int, teacher: PretrainedConfig, rule: str, name: str, layers: int = 1) -> int:
    """
    Finds the number of heads of a student's tower.

    Args:
        width: Of the tower.
        teacher: The config of the teacher's tower.
        rule: `whole`, heads as wide as the teacher's where they divide the width; `narrow`, as many heads as the
            teacher, or the largest number below whose heads have a width that is a multiple of 8 and at least 16; or
            `all`, likewise, but as many as all layers together that a layer of the student's stands for. There are
            no more than these, for a start would not know what to make of others. `whole` and the others each stand
            in where the other finds nothing.
        name: `vision` or `text`, for errors.
        layers: Of the teacher's, that each layer of the student's stands for at least.

    Raises:
        ValueError: If no number of heads fits.
    """
    widest, most = head_width(teacher), teacher.num_attention_heads * (layers if rule == "all" else 1)
    whole = width // widest if width % widest == 0 else None
    if whole and (rule == "whole" or whole == most):
        return whole
    narrowest = min(_NARROWEST, widest)
    counts = [width // one for one in range(_STEP, widest + 1, _STEP) if one >= narrowest and width % one == 0]
    counts = [count for count in counts if count <= most]
    if counts:
        return max(counts)
    if whole:
        return whole
    below, above = width // widest * widest, (width // widest + 1) * widest
    near = " or ".join(str(one) for one in (below, above) if 0 < one <= teacher.hidden_size)
    raise ValueError(
        f"{name}.hidden_size={width} is not a multiple of the teacher's head width {widest}, nor of heads that are "
        f"narrower, but at least {narrowest} wide and a multiple of {_STEP}; pick {near}, or give "
        f"{name}.num_attention_heads."
    )


def check_head_count(count: int, width: int, teacher: PretrainedConfig, name: str) -> None:
    """
    Checks a number of heads that was asked for.

    Args:
        count: The heads.
        width: Of the tower.
        teacher: The config of the teacher's tower.
        name: `vision` or `text`, for errors.

    Raises:
        ValueError: If they do not divide the width, or would be wider than the teacher's.
    """
    widest = head_width(teacher)
    if type(count) is not int or count < 1 or width % count or width // count > widest:
        fitting = [one for one in range(1, width + 1) if width % one == 0 and width // one <= widest]
        raise ValueError(
            f"{name}.num_attention_heads={count!r} does not fit {name}.hidden_size={width}: heads must divide the "
            f"width, and be no wider than the teacher's {widest}. Those that do are {fitting}."
        )


def shown_heads(teacher: PretrainedConfig, student: PretrainedConfig) -> str:
    """
    Says which heads a student has, and how they compare with its teacher's.

    Args:
        teacher: The teacher's config.
        student: The student's config.
    """
    towers = []
    for name in ("vision", "text"):
        big, small = (getattr(config, f"{name}_config") for config in (teacher, student))
        kept = [
            *["as many as the teacher's"] * (small.num_attention_heads == big.num_attention_heads),
            *["as wide as the teacher's"] * (head_width(small) == head_width(big)),
        ]
        which = " and ".join(kept) or f"of the teacher's {big.num_attention_heads} heads of {head_width(big)} channels"
        towers.append(f"{name} {small.num_attention_heads} of {head_width(small)} channels, {which}")
    return f"Attention heads: {'; '.join(towers)}."
