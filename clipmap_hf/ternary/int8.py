"""Runs a linear layer of ternary weights in 8-bit arithmetic; every token is rounded to 255 steps of its own."""

import torch
from torch.nn import functional as F


__all__ = ["int8_linear", "int8_pays", "int8_works"]

_STEPS = 127
_CUDA_TOKENS, _CUDA_MULTIPLE = 32, 8  # CUDA's integer product needs at least 32 tokens, and sizes divisible by 8
# A layer with at least as many weights is faster with a hundred tokens (recipes/benchmarks/ternary.py --parts layers).
_WEIGHTS = 2**17
_FAST_CPU = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def int8_linear(
    tokens: torch.Tensor, trits: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    Computes the output of a linear layer. The product is exact, in int32. The only error comes from rounding the
    tokens: at most half of 1/127 of a token's largest value.

    Args:
        tokens: The input, float, `(…, columns)`.
        trits: The weight's trits, transposed: int8, `(columns, rows)`.
        levels: A level for each row, `(rows,)`, or one level for all rows, `(1,)`.
        bias: The bias, `(rows,)`.

    Returns:
        The output, `(…, rows)`, in the dtype of `tokens`.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    steps = flat.abs().amax(dim=1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / _STEPS
    whole = (flat / steps).round_().to(torch.int8)
    if whole.is_cuda and len(whole) < _CUDA_TOKENS:
        whole = F.pad(whole, (0, 0, 0, _CUDA_TOKENS - len(whole)))
    product = torch._int_mm(whole, trits)[: len(flat)].float().mul_(steps).mul_(levels.float())  # (tokens, rows)
    if bias is not None:
        product += bias
    return product.to(tokens.dtype).view(*tokens.shape[:-1], trits.shape[1])


def int8_works(tokens: torch.Tensor, shape: tuple[int, int], levels: torch.Tensor) -> bool:
    """
    Tells whether `int8_linear` can run a layer. Every row must have one level, and no gradient must be needed. The
    device must be a CPU, or a GPU that can multiply integers of these sizes.

    Args:
        tokens: The input, `(…, columns)`.
        shape: Shape of the weight, `(rows, columns)`.
        levels: The weight's levels, `(rows, groups)`.
    """
    wants_gradient = torch.is_grad_enabled() and tokens.requires_grad
    fits = tokens.device.type == "cpu" or (tokens.is_cuda and not any(size % _CUDA_MULTIPLE for size in shape))
    return levels.shape[1] == 1 and not wants_gradient and fits


def int8_pays(tokens: torch.Tensor, shape: tuple[int, int]) -> bool:
    """
    Tells whether `int8_linear` is expected to be faster than a float product. This is so for large layers on CPUs with
    wide integer products. On a GPU, fp16 products are fast already.

    Args:
        tokens: The input, `(…, columns)`.
        shape: Shape of the weight, `(rows, columns)`.
    """
    return tokens.device.type == "cpu" and _FAST_CPU and shape[0] * shape[1] >= _WEIGHTS
