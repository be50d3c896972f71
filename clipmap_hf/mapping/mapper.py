"""From frozen teacher tensors and trained operators to the weights of a smaller CLIP of the same class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.families import TensorSpec
from clipmap_hf.mapping.depth import one_hot_depth
from clipmap_hf.mapping.operators import Operator, mix_depth, project_axes
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.mapping.statistics import Statistics
from clipmap_hf.models.batch_norms import batch_norms, reestimate_batch_norms
from clipmap_hf.models.finite import check_finite


__all__ = ["WeightMapper"]


class WeightMapper(nn.Module):
    """
    Maps a teacher's weights into a smaller model: along each axis by the operator of the space it lives in, then over
    depth by a mixing matrix (CLIP-Map Eq. 2–4, A.3). Only the operators are parameters; the teacher's tensors are
    buffers that no state dict holds. `clipmap_hf.starts.start_mapper` makes mappers.

    If the plan folds, each student tensor, but for the token table and statistics, is the mapped tensor plus a
    correction, which is trained with the operators. A tower that is as large as the teacher's is copied as it is, and
    has no operators.

    BatchNorms of a tower that is cut start with mapped statistics. These are then the student's own: a forward pass in
    training changes them as in any other model, and operators do not.

    Args:
        plan: Which tensors and operators there are.
        tensors: The teacher's, as `plan.teacher_tensors` gives them; the mapper lies where they lie.
        operators: The initial width operators, of the names and shapes that `plan.operator_shapes` gives; others are
            ignored.
        layers: The teacher's layers that each stack of the student's (`plan.stacks`) starts from; depth matrices start
            one-hot.
    """

    def __init__(
        self,
        plan: MappingPlan,
        tensors: Mapping[str, torch.Tensor],
        operators: Mapping[str, torch.Tensor],
        layers: Mapping[str, Sequence[int]],
    ):
        super().__init__()
        self.plan = plan
        for name in plan.copied:
            self.register_parameter(name, nn.Parameter(tensors[name].clone(), requires_grad=False))
        for index, spec in enumerate(plan.kinds):
            self.register_buffer(f"teacher_{index}", _stacked(tensors, spec, plan), persistent=False)
        # The skeleton lends its forward pass; its own weights are never read, so it stays out of the registry.
        skeleton = AutoModel.from_config(copy.deepcopy(plan.student), dtype=torch.float32)
        self.__dict__["skeleton"] = skeleton.requires_grad_(False)
        initial = {name: operators[name] for name in plan.operator_shapes()}
        for spec in plan.mapped_kinds:
            if spec.layer is not None:
                stack = plan.stack(spec)
                initial[plan.depth_name(spec)] = one_hot_depth(list(layers[stack]), plan.stacks()[stack][0])
        self.operators = nn.ModuleDict({name: self._operator(value) for name, value in initial.items()})
        self.corrections = nn.ModuleDict(self._zero_corrections() if plan.folds else {})
        self.to(self.logit_scale.device)  # operators start on the CPU, where a seed always means the same numbers
        with torch.no_grad():
            has_any = any(map(plan.is_statistic, plan.kinds))
            self.statistics = Statistics(self._mapped(statistics=True) if has_any else {})

    @classmethod
    def from_state(
        cls, plan: MappingPlan, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
    ) -> WeightMapper:
        """
        The mapper that had the state dict `state`.

        Args:
            plan: That of the mapper.
            tensors: The teacher's, as above.
            state: The operators, corrections and copied tensors.

        Raises:
            ValueError: If a tensor of the state is missing, unknown, of another shape or not finite; the message names
                them.
        """
        zeros = {name: torch.zeros(shape) for name, shape in plan.operator_shapes().items()}
        mapper = cls(plan, tensors, zeros, {name: range(small) for name, (_, small) in plan.stacks().items()})
        expected = mapper.state_dict()
        wrong = sorted(
            name
            for name in state.keys() | expected.keys()
            if name not in state or name not in expected or state[name].shape != expected[name].shape
        )
        if wrong:
            raise ValueError(f"tensors missing, unknown or of another shape: {wrong}.")
        check_finite(state, "the map")
        mapper.load_state_dict(state, strict=True)
        return mapper

    @property
    def map_config(self) -> ClipMapConfig:
        """The student's size and how the operators started."""
        return self.plan.config

    @property
    def config(self) -> PretrainedConfig:
        """The student's model config, under the name that transformers looks for."""
        return self.plan.student

    def forward(self, **inputs: torch.Tensor):
        """
        The student's `CLIPOutput` for `input_ids`, `attention_mask`, `pixel_values`; gradients reach the operators
        only. In training, just the rows of the token table that the batch looks up are mapped.
        """
        return self._call("forward", inputs)

    def get_image_features(self, **inputs: torch.Tensor):
        """What the student's `get_image_features` gives for `pixel_values`."""
        return self._call("get_image_features", inputs)

    def get_text_features(self, **inputs: torch.Tensor):
        """What the student's `get_text_features` gives for `input_ids` and `attention_mask`."""
        return self._call("get_text_features", inputs)

    def materialize(self, token_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """
        The student's weights under their state-dict names, in fp32 whatever the autocast.

        Args:
            token_ids: If given, rows of the token table that are not among them stay zero (cheaper in training).
        """
        weights = self._mapped(token_ids)
        return {**weights, **self.statistics.tensors(), **{name: getattr(self, name) for name in self.plan.copied}}

    def _mapped(self, token_ids: torch.Tensor | None = None, statistics: bool = False) -> dict[str, torch.Tensor]:
        """The weights that are mapped, or the statistics."""
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            operators = {name: operator() for name, operator in self.operators.items()}
            weights = {}
            for index, spec in enumerate(self.plan.kinds):
                if self.plan.is_statistic(spec) != statistics:
                    continue
                mapped = self._map(getattr(self, f"teacher_{index}"), spec, operators, token_ids)
                if (name := self.plan.correction_name(spec)) in self.corrections:
                    mapped = mapped + self.corrections[name]()
                if spec.rule.stacked > 1:
                    mapped = mapped.flatten(-1 - len(spec.rule.axes), -len(spec.rule.axes))
                if spec.layer is None:
                    weights[spec.kind] = _laid_out(mapped)
                else:
                    layers = self.plan.family.layers(spec, self.plan.student)
                    weights |= {spec.name(layer): _laid_out(one) for layer, one in zip(layers, mapped, strict=True)}
        return weights

    @torch.no_grad()
    def export(self) -> PreTrainedModel:
        """The student as an ordinary model of the teacher's class, in eval mode."""
        # The config is copied because models write into theirs; its dtype would be that of the teacher's checkpoint.
        student = AutoModel.from_config(copy.deepcopy(self.plan.student), dtype=self.logit_scale.dtype)
        student.load_state_dict(self.materialize(), strict=True)
        return student.to(self.logit_scale.device).eval()

    @torch.no_grad()
    def correct(self, weights: Mapping[str, torch.Tensor]) -> None:
        """
        Sets the corrections and the statistics so that the student has these weights (a state dict); its token table
        stays mapped.
        """
        mapped = self.materialize()
        for spec in self.plan.kinds:
            if (name := self.plan.correction_name(spec)) in self.corrections:
                change = self._student_tensor(weights, spec) - self._student_tensor(mapped, spec)
                self.corrections[name].start(self.corrections[name]() + change)
        self.statistics.load(weights)

    def measure_statistics(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """
        Measures the statistics of the student's BatchNorms on batches, as `reestimate_batch_norms` takes them. Without
        BatchNorms in a tower that is cut, it does nothing.
        """
        if self.statistics.tensors():
            student = self.export()
            reestimate_batch_norms(student, batches)
            self.statistics.load(student.state_dict())

    def _call(self, method: str, inputs: Mapping[str, torch.Tensor]):
        """Calls a method of the skeleton with the mapped weights in place of its own."""
        weights = self.materialize(inputs.get("input_ids") if self.training else None)
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        return functional_call(_Method(self.skeleton, method), weights, args=(), kwargs=inputs)

    def _map(
        self,
        tensor: torch.Tensor,
        spec: TensorSpec,
        operators: Mapping[str, torch.Tensor],
        token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        plan = self.plan
        if spec.tower not in plan.cut:
            return tensor
        rank = len(spec.rule.axes)
        along = {
            axis - rank: operators[name]
            for axis, space in enumerate(spec.rule.axes)
            if space is not None and (name := plan.operator_name(space, spec.tower)) in operators
        }
        if spec.rule.squared:
            along = {axis: operator.square() for axis, operator in along.items()}
        if spec.rule.lookup and token_ids is not None:
            rows = token_ids.unique()
            mapped = project_axes(tensor[rows], along)
            return mapped.new_zeros(len(tensor), mapped.shape[1]).index_copy(0, rows, mapped)
        mapped = project_axes(tensor, along)
        if spec.layer is None:
            return mapped
        mixed = mix_depth(mapped.to(self.logit_scale.dtype), operators[plan.depth_name(spec)])
        return mixed.to(tensor.dtype)  # of batches that were counted, an integer

    def _zero_corrections(self) -> dict[str, Operator]:
        weights = self.skeleton.state_dict()
        return {
            self.plan.correction_name(spec): self._operator(torch.zeros_like(self._student_tensor(weights, spec)))
            for spec in self.plan.mapped_kinds
            if not spec.rule.lookup and not spec.rule.statistic
        }

    def _operator(self, initial: torch.Tensor) -> Operator:
        return Operator(initial, decay_to_zero=self.map_config.decay_towards == "zero")

    def _student_tensor(self, weights: Mapping[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """The student's tensor of a kind, stacked over layers."""
        if spec.layer is None:
            return weights[spec.kind]
        layers = self.plan.family.layers(spec, self.plan.student)
        return torch.stack([weights[spec.name(layer)] for layer in layers])

    def _apply(self, fn: Callable, *args, **kwargs):
        self.skeleton._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def train(self, mode: bool = True):
        self.skeleton.train(mode)
        for tower in {"vision", "text"} - {*self.plan.cut}:  # it is kept, and so are its statistics
            for norm in batch_norms(getattr(self.skeleton, f"{tower}_model")):
                norm.eval()
        return super().train(mode)


class _Method(nn.Module):
    """A method of a model as a forward pass, which `functional_call` can call."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **inputs: torch.Tensor):
        return getattr(self.model, self.method)(**inputs)


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the layout of a model's own; of a kernel of one pixel, `contiguous` would not change a thing."""
    return tensor.contiguous() if tensor.ndim < 4 else tensor.clone(memory_format=torch.contiguous_format)


def _stacked(tensors: Mapping[str, torch.Tensor], spec: TensorSpec, plan: MappingPlan) -> torch.Tensor:
    """A copy of the teacher's tensors of a kind, stacked over layers: `(layers, …)`, or `(…)` outside the layers."""
    if spec.layer is None:
        layers = [tensors[spec.kind]]
    else:
        layers = [tensors[spec.name(layer)] for layer in plan.family.layers(spec, plan.teacher)]
    if spec.rule.stacked > 1:
        layers = [tensor.unflatten(0, (spec.rule.stacked, -1)) for tensor in layers]
    return layers[0].clone() if spec.layer is None else torch.stack(layers)
