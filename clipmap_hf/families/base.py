"""The table of axes: for every tensor of a CLIP family, the space that each of its axes lives in."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig


__all__ = ["Family", "NormRule", "TensorRule", "TensorSpec"]


@dataclass(frozen=True)
class TensorRule:
    """
    One line of the table.

    Args:
        pattern: Regular expression of the whole state-dict name. Its group `layer` is the layer's number; its group
            `tower` is `vision` or `text`, unless `tower` says it.
        axes: The space of each axis, `None` for an axis that stays as it is. `x` writes the space `x` (the paper's
            F^out), `x.in` reads it (F^in).
        tower: The tower of a tensor whose name does not begin with it.
        lookup: Whether the rows are looked up by token id, so that a batch needs only some of them.
        stacked: How many tensors of these axes lie on top of one another: 3 where query, key and value are one tensor.
    """

    pattern: str
    axes: tuple[str | None, ...]
    tower: str | None = None
    lookup: bool = False
    stacked: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """
    What the table says of one tensor.

    Args:
        kind: The state-dict name with `*` for the layer's number; tensors of a kind are stacked over layers.
        tower: `vision`, `text`, or `None` for a tensor of neither, which is copied (`logit_scale`).
        layer: The layer's number, `None` outside the layers.
        rule: The line that matched.
    """

    kind: str
    tower: str | None
    layer: int | None
    rule: TensorRule

    def name(self, layer: int | None) -> str:
        """The state-dict name of this kind in another layer."""
        return self.kind if layer is None else self.kind.replace("*", str(layer))


@dataclass(frozen=True)
class NormRule:
    """
    A LayerNorm that only linear layers read, so that its scale and shift can be folded into them.

    Args:
        norm: Its name, with `*` for the layer's number.
        readers: The names of the linear layers.
    """

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """
    A family of CLIP models that share tensor names.

    Args:
        name: Its name.
        model_types: The `config.model_type`s that the table describes.
        rules: The table; every tensor matches exactly one line.
        spaces: The attribute of a tower's config that holds the size of each space. Spaces that are not listed belong
            to the whole model and have the size of the config attribute of `shared_spaces`.
        shared_spaces: The same for spaces that both towers share; the attribute may be that of a tower's config.
        layer_spaces: Spaces that are private to a layer; the rest are one per tower.
        norms: The LayerNorms that can be folded into what reads them.
        ties: Spaces that are mapped by the operator of another, besides those of `operator_ties`.
        layerwise: Whether `Tower` can go through its models layer by layer; calibrated starts, MoPE's errors and
            budgets chosen by activations need that.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[TensorRule, ...]
    spaces: Mapping[str, str]
    shared_spaces: Mapping[str, str]
    layer_spaces: frozenset[str]
    norms: tuple[NormRule, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    layerwise: bool = True

    def match(self, name: str) -> TensorSpec:
        """
        The one line that describes the tensor `name`.

        Raises:
            ValueError: If no line matches, or more than one.
        """
        found = [(rule, match) for rule in self.rules if (match := re.fullmatch(rule.pattern, name))]
        if len(found) != 1:
            raise ValueError(
                f"Tensor {name!r} matches {len(found)} rules of the family {self.name!r}; it must match exactly one. "
                "Is this model of another family, or does it carry tensors that CLIP does not have?"
            )
        rule, match = found[0]
        groups = match.groupdict()
        layer = groups.get("layer")
        kind = name if layer is None else name[: match.start("layer")] + "*" + name[match.end("layer") :]
        return TensorSpec(kind, rule.tower or groups.get("tower"), None if layer is None else int(layer), rule)

    def size(self, space: str, tower: str | None, config: PretrainedConfig) -> int:
        """The size of a space (`x` or `x.in`) in a model of the given config."""
        space = space.removesuffix(".in")
        if space in self.shared_spaces:
            return operator.attrgetter(self.shared_spaces[space])(config)
        return getattr(getattr(config, f"{tower}_config"), self.spaces[space])

    def specs(self, tensors: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, TensorSpec]:
        """
        Describes all tensors of a model and checks them against the table and the config.

        Args:
            tensors: The model's state dict.
            config: Its config.

        Raises:
            ValueError: If a tensor matches no line or several, or an axis has not the size of its space.
        """
        specs = {name: self.match(name) for name in tensors}
        for name, spec in specs.items():
            shape, axes = tuple(tensors[name].shape), spec.rule.axes
            sizes = [
                given if space is None else self.size(space, spec.tower, config)
                for given, space in zip(shape, axes, strict=False)
            ]
            sizes = tuple(size if axis else size * spec.rule.stacked for axis, size in enumerate(sizes))
            if len(shape) != len(axes) or shape != sizes:
                raise ValueError(
                    f"Tensor {name!r} has the shape {shape}; the family {self.name!r} expects the axes {axes}, which "
                    f"have the sizes {sizes} by the model's config."
                )
        return specs
