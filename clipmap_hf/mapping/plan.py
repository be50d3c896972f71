"""What a mapping consists of before any operator has a value: tensors, spaces, names and shapes of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.config import ClipMapConfig, cut_towers, student_config
from clipmap_hf.config.heads import head_width
from clipmap_hf.families import Family, TensorSpec, family_for
from clipmap_hf.mapping.depth import DEPTH_RULES
from clipmap_hf.mapping.fold import fold
from clipmap_hf.models.loading import check_float


__all__ = ["MappingPlan", "operator_ties"]


@dataclass(frozen=True)
class MappingPlan:
    """
    All of a mapping that follows from the teacher's tensor names and the configs.

    Args:
        config: What was asked for.
        family: The teacher's table of axes.
        teacher: The teacher's config.
        student: The student's config.
        kinds: The kinds of tensors that the student has, in the order of the teacher's state dict, but for what is
            copied.
        copied: The names of the tensors that are copied: `logit_scale`, and SigLIP's bias.
        cut: The towers that are smaller in the student; the others are copied, and have no operators.
        folds: Whether the teacher's LayerNorms are folded first, and the student's weights may be corrected.
        ties: Spaces that are mapped by the operator of another space.
    """

    config: ClipMapConfig
    family: Family
    teacher: PretrainedConfig
    student: PretrainedConfig
    kinds: tuple[TensorSpec, ...]
    copied: tuple[str, ...]
    cut: tuple[str, ...]
    folds: bool
    ties: Mapping[str, str]

    @classmethod
    def make(cls, teacher: PreTrainedModel, config: ClipMapConfig, folds: bool = False) -> MappingPlan:
        """
        Plans the mapping of a teacher.

        Args:
            teacher: The model to compress.
            config: The student's size and how the operators start.
            folds: As above.

        Raises:
            ValueError: If the teacher is of no known family or packed, or the sizes do not fit it.
        """
        check_float(teacher, "Mapping")
        family, student = family_for(teacher.config), student_config(teacher.config, config)
        specs = family.specs(teacher.state_dict(), teacher.config)
        kinds = {}
        for spec in specs.values():
            has_none = spec.layer is not None and not family.layers(spec, student)  # in a stage of a single block
            if spec.tower is not None and not has_none:
                kinds.setdefault(spec.kind, spec)
        return cls(
            config=config,
            family=family,
            teacher=teacher.config,
            student=student,
            kinds=tuple(kinds.values()),
            copied=tuple(name for name, spec in specs.items() if spec.tower is None),
            cut=cut_towers(teacher.config, student),
            folds=folds,
            ties={**operator_ties(config, folds), **family.ties},
        )

    @property
    def mapped_kinds(self) -> list[TensorSpec]:
        """The kinds of tensors of the towers that are cut."""
        return [spec for spec in self.kinds if spec.tower in self.cut]

    def is_statistic(self, spec: TensorSpec) -> bool:
        """Whether a kind is a BatchNorm's statistic that is mapped only once, and then the student's own."""
        return spec.rule.statistic and spec.tower in self.cut

    def teacher_tensors(self, teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
        """
        The teacher's state dict in fp32, folded in the towers that are cut if the plan says so. What counts, as a
        BatchNorm's batches, stays an integer.
        """
        tensors = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        if not self.folds:
            return tensors
        folded = fold(tensors, self.family)
        return {
            name: folded[name] if self.family.match(name).tower in self.cut else tensor
            for name, tensor in tensors.items()
        }

    def operator_shapes(self) -> dict[str, tuple[int, ...]]:
        """
        The width operators by name, in the order of the table: `(small, big)`, or `(layers, small, big)` for a space
        that is private to a layer. A joint embedding that keeps its size has no operator.
        """
        shapes, family = {}, self.family
        for spec in self.mapped_kinds:
            for space in (self.ties.get(space, space) for space in spec.rule.axes if space is not None):
                small, big = (family.size(space, spec.tower, config) for config in (self.student, self.teacher))
                if space in family.shared_spaces and small == big:
                    continue
                is_layered = space.removesuffix(".in") in family.layer_spaces
                layers = (len(family.layers(spec, self.teacher)),) if is_layered else ()
                shapes[self.operator_name(space, spec.tower)] = (*layers, small, big)
        return shapes

    def head_widths(self) -> dict[str, tuple[int, int]]:
        """
        The operators of the channels of heads, by name, with the width of a head in the student and in the teacher;
        those of towers whose heads become narrower.
        """
        found = {}
        for tower in self.cut:
            small, big = (head_width(getattr(config, f"{tower}_config")) for config in (self.student, self.teacher))
            spaces = sorted(self.family.head_spaces & self.family.spaces.keys())
            found |= {self.operator_name(space, tower): (small, big) for space in spaces if small < big}
        return found

    def operator_name(self, space: str, tower: str | None) -> str:
        """The operator that maps a space of a tower."""
        space = self.ties.get(space, space).replace(".", "_")
        return space if space in self.family.shared_spaces else f"{tower}_{space}"

    def depth_name(self, spec: TensorSpec) -> str:
        """The depth matrix that mixes the layers of a kind of tensors."""
        if self.config.depth_per == "tower":
            return f"{self.stack(spec)}_depth"
        module = spec.kind.split("*.")[1].rpartition(".")[0]  # weight and bias of a module share theirs
        return f"{self.stack(spec)}_depth_{module.split('.')[-1]}"

    def stack(self, spec: TensorSpec) -> str:
        """Names the layers that a kind of tensors belongs to: those of a tower, or of a ResNet's stage."""
        depth = spec.rule.depth
        return spec.tower if depth == "num_hidden_layers" else f"{spec.tower}_{depth.replace('.', '_')}"

    def stacks(self) -> dict[str, tuple[int, int]]:
        """The layers of the teacher and of the student by `stack`, of the towers that are cut."""
        configs, kinds = (self.teacher, self.student), [spec for spec in self.mapped_kinds if spec.layer is not None]
        return {self.stack(spec): tuple(len(self.family.layers(spec, one)) for one in configs) for spec in kinds}

    def correction_name(self, spec: TensorSpec) -> str:
        """The correction of a kind of tensors; modules cannot have dots in their names."""
        return spec.kind.replace(".", "-")

    def depths(self, tower: str) -> tuple[int, int]:
        """Layers of the teacher and of the student."""
        teacher, student = (getattr(config, f"{tower}_config") for config in (self.teacher, self.student))
        return teacher.num_hidden_layers, student.num_hidden_layers

    def layers_by_rule(self) -> dict[str, list[int]]:
        """
        The teacher's layers that each stack of the student's starts from, counted from 0, by the rule that
        `config.depth` names.

        Raises:
            KeyError: If it is no key of `DEPTH_RULES`, but the rule of a start.
        """
        rule = DEPTH_RULES[self.config.depth]
        return {name: rule(big, small) for name, (big, small) in self.stacks().items()}


def operator_ties(config: ClipMapConfig, folds: bool = False) -> dict[str, str]:
    """
    The spaces that have no operator of their own, with the spaces whose operator they go through. What reads the
    residual stream, or the values, does so through the operator that writes them (A.3), and vision embeddings write
    the stream; a start that folds knows better operators for the last two.

    Args:
        config: Says whether the operators of the FFN are tied.
        folds: Whether the teacher is folded.
    """
    ties = {"residual.in": "residual"}
    if not folds:
        ties |= {"value.in": "value", "patch": "residual"}
    return {**ties, "ffn.in": "ffn"} if config.tie_ffn else ties
