"""Convolutions with the BatchNorms behind them as linear layers, which are solved by least squares."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from clipmap_hf.starts.calibrated.moments import Moments


__all__ = [
    "Example",
    "PlaceDraw",
    "Run",
    "Unit",
    "folded",
    "input_of",
    "output_of",
    "solve_from",
    "solve_units",
    "units",
]

_RIDGE = 1e-3
_PLACES = 16  # per input are enough to solve a layer

Unit = tuple[nn.Conv2d, nn.BatchNorm2d]
Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # inputs, targets (rows, …), and weights (rows,)
Run = Callable[[torch.Tensor], torch.Tensor]


class PlaceDraw:
    """
    Draws places of images, the same of all images of a batch, so that the work does not grow with their size.

    Args:
        images: How many there are in all batches, of all processes.
        inputs: Of the layer that is to be solved; the more, the more places.
    """

    def __init__(self, images: int, inputs: int):
        self.count = -(-_PLACES * inputs // images)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of some places of `(images, channels, height, width)`."""
        height, width = stream.shape[2:]
        places = torch.randperm(height * width, generator=self.generator)[: self.count].to(stream.device)
        return places // width, places % width


def units(tower: nn.Module) -> dict[str, Unit]:
    """The convolutions of a `ModifiedResNet` by their names, each with its BatchNorm."""
    modules = dict(tower.named_modules())
    return {
        name: (module, modules[name.replace("downsample.0", "downsample.1").replace("conv", "bn")])
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d)
    }


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What both compute in evaluation, as a linear layer of patches: weight `(outputs, inputs)`, bias `(outputs,)`."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight.flatten(1) * scale[:, None], norm.bias - norm.running_mean * scale


def input_of(module: nn.Module, run: Run, stream: torch.Tensor) -> torch.Tensor:
    """What a module reads in a run that it is part of."""
    found = []
    with module.register_forward_pre_hook(lambda _, inputs: found.extend(inputs)):
        run(stream)
    return found[0]


def output_of(module: nn.Module, run: Run, stream: torch.Tensor) -> torch.Tensor:
    """What a module gives in a run that it is part of."""
    found = []
    with module.register_forward_hook(lambda _, inputs, output: found.append(output)):
        run(stream)
    return found[0]


def solve_units(
    solved: Sequence[Unit], examples: Iterable[tuple[Sequence[torch.Tensor], torch.Tensor]], images: int
) -> None:
    """
    Solves convolutions whose norms' outputs are added up, so that the sum is nearest to a target. The ridge pulls to
    what they were before.

    Args:
        solved: The convolutions, each with its norm; changed in place.
        examples: What each of them reads, `(images, channels, height, width)`, and the target of the sum.
        images: How many there are in all examples, of all processes.
    """
    weight = torch.cat([folded(*unit)[0] for unit in solved], dim=1)
    draw = PlaceDraw(images, weight.shape[1])

    def rows() -> Iterable[Example]:
        for inputs, target in examples:
            places = draw(target)
            patches = [_patches(conv, one, places) for (conv, _), one in zip(solved, inputs, strict=True)]
            yield torch.cat(patches, dim=1), target[:, :, *places].movedim(1, -1).flatten(0, 1), None

    weight, bias = solve_from(weight, rows(), _RIDGE)
    sizes = [conv.weight[0].numel() for conv, _ in solved]
    for (conv, norm), own in zip(solved, weight.split(sizes, dim=1), strict=True):
        _set_unit(conv, norm, own, bias)
        bias = torch.zeros_like(bias)  # one of them has all of it


def solve_from(weight: torch.Tensor, examples: Iterable[Example], ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The linear layer that gives the targets from the inputs with the least squared error, where the ridge pulls to a
    weight instead of to zero.

    Args:
        weight: `(outputs, inputs)`.
        examples: Inputs, targets, and how much each row counts.
        ridge: As in `Moments.solve`.

    Returns:
        Its weight and bias.
    """
    moments = Moments(weight.shape[1], weight.shape[0], device=weight.device)
    for inputs, targets, weights in examples:
        moments.add(inputs, targets - inputs @ weight.T, weights)
    moments.sum_over_processes()
    change, bias = moments.solve(ridge)
    return weight + change, bias


def _patches(conv: nn.Conv2d, stream: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What a convolution reads for some places of its output, `(images * places, inputs)`."""
    padding, stride = conv.padding[0], conv.stride[0]
    window = torch.arange(conv.kernel_size[0], device=stream.device)
    rows, columns = (one[:, None] * stride + window for one in places)
    found = F.pad(stream, (padding,) * 4)[:, :, rows[:, :, None], columns[:, None, :]]  # (…, places, kernel, kernel)
    return found.movedim(2, 1).flatten(2).flatten(0, 1)


def _set_unit(conv: nn.Conv2d, norm: nn.BatchNorm2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Lets both compute a linear layer of patches; each filter stays as long as it was, and its norm scales it."""
    before, length = conv.weight.flatten(1).norm(dim=1), weight.norm(dim=1)
    scale = torch.where((before > 0) & (length > 0), length / before, 1)
    conv.weight.copy_((weight / scale[:, None]).view_as(conv.weight))
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.copy_(scale)
    norm.bias.copy_(bias)
