"""The table of axes: for every tensor of a CLIP family, the space of each of its axes.

A space is a set of channels that several tensors share, such as the channels of a tower's residual stream.
"""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig


__all__ = ["BOTH_TOWERS", "Family", "NormRule", "TensorRule", "TensorSpec"]

BOTH_TOWERS = frozenset({"vision", "text"})


@dataclass(frozen=True)
class TensorRule:
    """
    One line of the table: the axes of all tensors whose names match a pattern.

    Args:
        pattern: Regular expression that matches the whole state-dict name. Its group `layer` is the layer's number.
            Its group `tower` is `vision` or `text`.
        axes: The space of each axis; `None` for an axis that is not mapped. `x` stands for an axis that writes the
            space `x` (the paper's F^out), and `x.in` for an axis that reads it (F^in).
        tower: The tower of the tensors, for a pattern without the group `tower`.
        lookup: Whether rows are looked up by token id, so that a batch needs only some of the rows.
        stacked: How many tensors with these axes are stacked along the first axis: 3 where query, key and value are
            stored as a single tensor.
        squared: Whether the tensors are variances, which go through the squares of an operator's entries.
        statistic: Whether the tensors are what a BatchNorm has measured. Only a student's first statistics are mapped
            from the teacher's; from then on, they are its own.
        depth: Of tensors in layers, how many layers there are, as the name of an attribute of the tower's config; with
            a number behind it where that is a list, as in `Family.spaces`.
        first: The number of the first of these layers in names of tensors.
    """

    pattern: str
    axes: tuple[str | None, ...]
    tower: str | None = None
    lookup: bool = False
    stacked: int = 1
    squared: bool = False
    statistic: bool = False
    depth: str = "num_hidden_layers"
    first: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """
    The description of one tensor.

    Args:
        kind: The state-dict name with `*` in place of the layer's number. Tensors of the same kind are stacked over
            the layers.
        tower: `vision`, `text`, or `None` for a tensor of neither tower (`logit_scale`), which is copied.
        layer: The layer's number, or `None` for a tensor outside the layers.
        rule: The line of the table that matched.
    """

    kind: str
    tower: str | None
    layer: int | None
    rule: TensorRule

    def name(self, layer: int | None) -> str:
        """Returns the state-dict name of the tensor of this kind in another layer."""
        return self.kind if layer is None else self.kind.replace("*", str(layer))


@dataclass(frozen=True)
class NormRule:
    """
    A LayerNorm that only linear layers read, so that its scale and shift can be folded into them.

    Args:
        norm: Name of the LayerNorm, with `*` in place of the layer's number.
        readers: Names of the linear layers that read it, in the same form.
    """

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """
    A family of CLIP models, which share the names of their tensors.

    Args:
        name: Name of the family.
        model_types: Every `config.model_type` that the table describes.
        rules: The lines of the table. Every tensor must match exactly one line.
        spaces: The size of each space that belongs to a tower, as the name of an attribute of the tower's config; with
            a number behind it, `x.2`, where that is a list.
        shared_spaces: The size of each space that both towers share, as the name of an attribute of the model's
            config. Dots in the name lead into the config of a tower.
        layer_spaces: Spaces of which every layer has its own. Of the other spaces, there is one per tower or, if they
            are shared, one per model.
        head_spaces: Spaces of which every attention head has its own part.
        norms: The LayerNorms that can be folded into the layers that read them.
        ties: Spaces that are mapped by the operator of another space, as `{space: other space}`. They are added to
            those of `operator_ties`.
        layerwise: The towers that `Tower` can run layer by layer. Calibrated starts need that of the text tower; the
            start `importance`, MoPE's errors, masks and budgets chosen by activations need it of both.
        transformers: Whether both towers are transformers, so that each has layers, heads and neurons. Masks,
            ternary weights and the hidden loss need that.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[TensorRule, ...]
    spaces: Mapping[str, str]
    shared_spaces: Mapping[str, str]
    layer_spaces: frozenset[str]
    head_spaces: frozenset[str] = frozenset({"query", "key", "value", "pool"})
    norms: tuple[NormRule, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    layerwise: frozenset[str] = BOTH_TOWERS
    transformers: bool = True

    @property
    def has_statistics(self) -> bool:
        """Whether its models have BatchNorms."""
        return any(rule.statistic for rule in self.rules)

    def match(self, name: str) -> TensorSpec:
        """
        Finds the line of the table that describes a tensor.

        Args:
            name: The tensor's state-dict name.

        Raises:
            ValueError: If no line matches, or several lines do.
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
        """Returns the size of a space (`x` or `x.in`) in a model of the given config."""
        space = space.removesuffix(".in")
        if space in self.shared_spaces:
            return operator.attrgetter(self.shared_spaces[space])(config)
        return _entry(getattr(config, f"{tower}_config"), self.spaces[space])

    def layers(self, spec: TensorSpec, config: PretrainedConfig) -> range:
        """Returns the numbers of the layers that have a tensor of this kind, in a model of the given config."""
        return range(spec.rule.first, _entry(getattr(config, f"{spec.tower}_config"), spec.rule.depth))

    def specs(self, tensors: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, TensorSpec]:
        """
        Describes all tensors of a model and checks them against the table and the config.

        Args:
            tensors: The model's state dict.
            config: The model's config.

        Returns:
            The description of each tensor, by its name.

        Raises:
            ValueError: If a tensor matches no line or several lines, or an axis does not have the size of its space.
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


def _entry(tower: PretrainedConfig, name: str) -> int:
    """The value of an attribute; with a number behind the name, an entry of a list."""
    attribute, _, entry = name.partition(".")
    value = getattr(tower, attribute)
    return value[int(entry)] if entry else value
