"""Finds NaN and infinity in weights, which would otherwise be noticed late, or never."""

from collections.abc import Mapping

import torch


__all__ = ["check_finite", "not_finite"]

_SHOWN = 5


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """
    Describes the tensors that hold NaN or infinity: their names, and what may be the reason. The description is empty
    if there are none.

    Args:
        tensors: The tensors by name, such as a state dict. Integers are not looked at.
    """
    bad = {
        name: tensor.dtype
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    }
    if not bad:
        return ""
    names = list(bad)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    narrow = sorted({str(dtype) for dtype in bad.values()} - {"torch.float32", "torch.float64"})
    hint = f" If they are too large for {' and '.join(narrow)}, use torch.float32." if narrow else ""
    return f"not finite numbers in {names[:_SHOWN]}{more}.{hint}"


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """
    Checks that weights are finite numbers.

    Args:
        tensors: The tensors by name, such as a state dict.
        what: Names their owner in the message, such as "The teacher 'id'".

    Raises:
        ValueError: If a tensor holds NaN or infinity. The message names it.
    """
    if found := not_finite(tensors):
        raise ValueError(
            f"{what} has weights that are {found} The weights are damaged, or come from a training that diverged; "
            "give others."
        )
