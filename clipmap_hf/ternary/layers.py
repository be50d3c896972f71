"""Linear layers, embeddings and convolutions with packed ternary weights, which several backends can run."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.int8 import int8_linear, int8_pays, int8_works
from clipmap_hf.ternary.packing import check_packed, pack, packed_columns, unpack
from clipmap_hf.ternary.quantizers import dequantized, grouped


__all__ = ["TERNARY", "TernaryConv2d", "TernaryEmbedding", "TernaryLinear", "TernaryModule"]


class TernaryModule(nn.Module):
    """
    The base class of ternary modules. Its tensors are `weight` (packed trits, uint8, `(rows, bytes)`), `weight_scale`
    (levels, fp16, `(rows, groups)`) and a float `bias`.

    `weight` is the name of the float tensor as well. So a library that does not know this package fails to load the
    packed tensor. Under another name, it would ignore it and make a random weight.

    Args:
        module: The float module that this module replaces. It may lie on the meta device.
        config: The options.
    """

    def __init__(self, module: nn.Module, config: TernaryConfig):
        super().__init__()
        self.shape, self.encoding, self.backend = tuple(module.weight.shape), config.encoding, "auto"
        self.columns = module.weight[0].numel()
        levels = grouped(module.weight.detach(), config.granularity, config.block_size).shape[:2]
        width = packed_columns(self.columns, config.encoding)
        device = module.weight.device
        self.register_buffer("weight", torch.empty(self.shape[0], width, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(levels, dtype=torch.float16, device=device))
        self.register_parameter("bias", getattr(module, "bias", None))
        self.kept: torch.Tensor | None = None  # the tensor that a backend computes with; not in the state dict

    def store(self, trits: torch.Tensor, levels: torch.Tensor) -> None:
        """Packs and stores trits, in the shape of the float weight, and their levels `(rows, groups)`."""
        _check_levels(levels, lambda: trits)
        self.weight = pack(trits.flatten(1), self.encoding)
        self.weight_scale, self.kept = levels, None

    def ready(self, dtype: torch.dtype) -> None:
        """Prepares the module for its first use after a load: checks the weight. `dtype` is that of the model."""
        self.check()

    def check(self) -> None:
        """
        Checks the weight.

        Raises:
            ValueError: If the bytes of the weight hold no trits, or a level does not fit its trits.
        """
        kinds = self.weight.dtype, self.weight_scale.dtype
        if kinds != (torch.uint8, torch.float16):
            raise ValueError(
                f"Trits and levels must be uint8 and float16, not {kinds}; the file is corrupt or belongs to another "
                "model."
            )
        check_packed(self.weight, self.columns, self.encoding)
        _check_levels(self.weight_scale, self.trits)

    def trits(self) -> torch.Tensor:
        """Returns the trits, int8, in the shape of the float weight."""
        return unpack(self.weight, self.columns, self.encoding).view(self.shape)

    def float_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the float weight: trits times levels."""
        return dequantized(self.trits(), self.weight_scale, dtype)

    def set_backend(self, backend: str) -> None:
        """Selects one of `BACKENDS`, and drops the tensor that the last backend kept."""
        self.backend, self.kept = backend, None

    def float_module(self, dtype: torch.dtype) -> nn.Module:
        """Returns the float module that this module replaces."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        levels = tuple(self.weight_scale.shape)
        return f"{self.shape}, levels={levels}, encoding={self.encoding!r}, backend={self.backend!r}"

    def _fill(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Puts the float weight and the bias into a float module."""
        module.weight = nn.Parameter(self.float_weight(dtype))
        if self.bias is not None:
            module.bias = self.bias
        return module.train(self.training)

    def _make_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the float weight, which all backends but `packed` keep."""
        if self.backend == "packed":
            return self.float_weight(dtype)
        return self._keep(dtype, lambda: self.float_weight(dtype))

    def _keep(self, dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Returns the kept tensor, which is made only once for a dtype and device."""
        if self.kept is None or self.kept.dtype != dtype or self.kept.device != self.weight.device:
            with torch.inference_mode(False):  # a tensor from inference mode could not be used for gradients
                self.kept = make()
        return self.kept

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        self.kept = None
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if not self.weight.is_meta:
            try:
                self.check()
            except ValueError as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")

    def _apply(self, fn, *args, **kwargs):
        levels = self.weight_scale
        super()._apply(fn, *args, **kwargs)
        if not levels.is_meta:  # levels stay in fp16, whatever the dtype of the model
            self.weight_scale = levels.to(self.weight_scale.device)
        return self

    def __getstate__(self):
        return {**self.__dict__, "kept": None}


class TernaryLinear(TernaryModule):
    """A linear layer, which all of `BACKENDS` can run."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        wanted = self.backend == "int8" or (self.backend == "auto" and int8_pays(tokens, self.shape))
        works = wanted and int8_works(tokens, self.shape, self.weight_scale)
        if self.backend == "int8" and not works:
            raise ValueError(
                "backend='int8' has no gradient and, on a GPU, needs layers whose sizes are multiples of 8; "
                "use 'auto'."
            )
        if works:
            trits = self._keep(torch.int8, lambda: self.trits().T.contiguous())
            return int8_linear(tokens, trits, self.weight_scale.squeeze(1), self.bias)
        return F.linear(tokens, self._make_weight(tokens.dtype), self.bias)

    def float_module(self, dtype: torch.dtype) -> nn.Linear:
        rows, columns = self.shape
        return self._fill(nn.Linear(columns, rows, self.bias is not None, device="meta"), dtype)


class TernaryEmbedding(TernaryModule):
    """An embedding. With every backend, only the rows that are looked up are unpacked."""

    def __init__(self, module: nn.Embedding, config: TernaryConfig):
        super().__init__(module, config)
        self.padding, self.dtype = module.padding_idx, torch.float32
        self.padding_idx = None  # or transformers would set this row to zero bytes when it loads Chinese-CLIP

    def ready(self, dtype: torch.dtype) -> None:
        super().ready(dtype)
        self.dtype = dtype

    def _apply(self, fn, *args, **kwargs):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, *args, **kwargs)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten()
        has_row_levels = len(self.weight_scale) > 1
        levels = F.embedding(flat, self.weight_scale) if has_row_levels else self.weight_scale.expand(len(flat), 1)
        packed = F.embedding(flat, self.weight)  # `self.weight[flat]` would accept -1 as the last row
        rows = dequantized(unpack(packed, self.columns, self.encoding), levels, self.dtype)
        return rows.view(*ids.shape, self.columns)

    def float_module(self, dtype: torch.dtype) -> nn.Embedding:
        return self._fill(nn.Embedding(*self.shape, padding_idx=self.padding, device="meta"), dtype)


class TernaryConv2d(TernaryModule):
    """
    A convolution. From `ready` on, its weight is float, since transformers casts images to the dtype of this weight.
    The float weight is small. In the state dict, the weight is packed.
    """

    def __init__(self, module: nn.Conv2d, config: TernaryConfig):
        if module.padding_mode != "zeros":
            raise ValueError(f"A convolution with padding_mode={module.padding_mode!r} cannot be ternary.")
        super().__init__(module, config)
        self.options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}

    def ready(self, dtype: torch.dtype) -> None:
        super().ready(dtype)
        self.__dict__["packed"], self.weight = self.weight, self.float_weight(dtype)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, self.weight, self.bias, **self.options)

    def trits(self) -> torch.Tensor:
        packed = self.__dict__.get("packed", self.weight)
        return unpack(packed.to(self.weight.device), self.columns, self.encoding).view(self.shape)

    def float_module(self, dtype: torch.dtype) -> nn.Conv2d:
        rows, channels, *size = self.shape
        bias = self.bias is not None
        channels *= self.options["groups"]
        return self._fill(nn.Conv2d(channels, rows, size, bias=bias, device="meta", **self.options), dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "packed" in self.__dict__:
            destination[f"{prefix}weight"] = self.__dict__["packed"]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        dtype, packed = self.weight.dtype, self.__dict__.pop("packed", None)
        if packed is not None:
            self.weight = packed.to(self.weight.device, copy=True)
        found, levels = len(errors), self.weight_scale.clone()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if packed is not None:
            if len(errors) > found:  # puts the old weight back, for code that catches the error
                self.weight, self.weight_scale = packed.to(self.weight.device), levels
            self.ready(dtype)

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        # Made anew from the trits: a cast to a smaller dtype and back would leave a rounded weight.
        if "packed" in self.__dict__ and not self.weight.is_meta:
            self.weight = self.float_weight(self.weight.dtype)
        return self


def _check_levels(levels: torch.Tensor, trits: Callable[[], torch.Tensor]) -> None:
    if not (levels.isfinite() & (levels >= 0)).all():
        raise ValueError(
            "A level is negative or no finite fp16 number: the weights are too large or not finite, or the file is "
            "corrupt."
        )
    is_zero = levels == 0
    if is_zero.any() and (is_zero & trits().reshape(*levels.shape, -1).any(dim=-1)).any():
        raise ValueError(
            "A level is zero (smaller than the smallest fp16 number), but not all of its trits are zero: the weights "
            "are too small, or the file is corrupt."
        )


TERNARY = {nn.Linear: TernaryLinear, nn.Embedding: TernaryEmbedding, nn.Conv2d: TernaryConv2d}
