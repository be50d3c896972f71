"""A linear layer of ternary weights in 8-bit arithmetic: every token is rounded to 255 steps of its own."""

import torch
from torch.nn import functional as F


__all__ = ["int8_linear", "int8_pays", "int8_works"]

_STEPS = 127
_CUDA_TOKENS, _CUDA_MULTIPLE = 32, 8  # what its product of integers asks for, at least
_WEIGHTS = 2**17  # from which on it is faster for a hundred tokens (recipes/benchmarks/ternary.py --parts layers)
_FAST_CPU = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def int8_linear(
    tokens: torch.Tensor, trits: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    The product is exact, in int32; what is lost is what rounding the tokens loses, half a 127th of a token's largest
    value at most.

    Args:
        tokens: `(…, columns)`, float.
        trits: The weight's, transposed: int8, `(columns, rows)`.
        levels: One for each row, or one for all: `(rows,)` or `(1,)`.
        bias: `(rows,)`.

    Returns:
        `(…, rows)`, in the dtype of `tokens`.
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
    Whether `int8_linear` can do it: one level a row, no gradient, a CPU, or a GPU and sizes that it can multiply.

    Args:
        tokens: `(…, columns)`.
        shape: Of the weight, `(rows, columns)`.
        levels: `(rows, groups)`.
    """
    wants_gradient = torch.is_grad_enabled() and tokens.requires_grad
    fits = tokens.device.type == "cpu" or (tokens.is_cuda and not any(size % _CUDA_MULTIPLE for size in shape))
    return levels.shape[1] == 1 and not wants_gradient and fits


def int8_pays(tokens: torch.Tensor, shape: tuple[int, int]) -> bool:
    """
    Whether `int8_linear` is expected to be faster than a float product: on CPUs with wide integer products, for large
    layers. On a GPU, float weights in fp16 are fast already.

    Args:
        tokens: `(…, columns)`.
        shape: Of the weight, `(rows, columns)`.
    """
    return tokens.device.type == "cpu" and _FAST_CPU and shape[0] * shape[1] >= _WEIGHTS
