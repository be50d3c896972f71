"""From frozen teacher tensors and trained operators to the weights of a smaller CLIP of the same class."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from clipmap_hf.config import ClipMapConfig, cut_towers, student_config
from clipmap_hf.families import Family, TensorSpec, family_for
from clipmap_hf.mapping.depth import DEPTH_RULES, one_hot_depth
from clipmap_hf.mapping.fold import fold
from clipmap_hf.mapping.initializers import CALIBRATED_INITIALIZERS, INITIALIZERS, SELECTIONS, check_start
from clipmap_hf.mapping.operators import Operator, mix_depth, project_axes
from clipmap_hf.models import check_float


__all__ = ["WeightMapper", "operator_shapes", "operator_ties"]


class WeightMapper(nn.Module):
    """
    Maps a teacher's weights into a smaller model: along each axis by the operator of the space it lives in, then over
    depth by a mixing matrix (CLIP-Map Eq. 2–4, A.3). Only the operators are parameters; the teacher's tensors are
    buffers that no state dict holds.

    With the initializer `calibrated`, the teacher is folded first, and each student tensor, but for the token table,
    is the mapped one plus a correction, which is trained with the operators.

    A tower that is as large as the teacher's is copied as it is, and has no operators.

    Args:
        teacher: The model to compress; its tensors are copied in fp32, and the mapper lies where they lie.
        config: The student's size and how the operators start. With one of `CALIBRATED_INITIALIZERS` or `SELECTIONS`
            they are not a number until `start_from_activations` or `start_from_selection` sets them, or a state dict
            is loaded.

    Raises:
        ValueError: If the teacher is of no known family or packed, the sizes do not fit it, or a name in `config` is
            unknown.
    """

    def __init__(self, teacher: PreTrainedModel, config: ClipMapConfig):
        super().__init__()
        check_float(teacher, "Mapping")
        self.config = config
        self.family = family_for(teacher.config)
        self.student_config = student_config(teacher.config, config)
        check_start(self.family, config.initializer)
        tensors = {name: tensor.detach().float() for name, tensor in teacher.state_dict().items()}
        specs = self.family.specs(tensors, teacher.config)
        self.copied = [name for name, spec in specs.items() if spec.tower is None]  # `logit_scale`, SigLIP's bias
        for name in self.copied:
            self.register_parameter(name, nn.Parameter(tensors[name].clone(), requires_grad=False))
        self.cut = cut_towers(teacher.config, self.student_config)
        self.folds = config.initializer == "calibrated"
        self.ties = {**operator_ties(config), **self.family.ties}
        if self.folds:
            folded = fold(tensors, self.family)
            tensors |= {name: folded[name] for name, spec in specs.items() if spec.tower in self.cut}
        self.kinds = _stack(self, tensors, specs)
        # The skeleton lends its forward pass; its own weights are never read, so it stays out of the registry.
        skeleton = AutoModel.from_config(copy.deepcopy(self.student_config), dtype=torch.float32)
        self.__dict__["skeleton"] = skeleton.requires_grad_(False)
        self.operators = nn.ModuleDict(self._initial_operators(teacher.config))
        self.corrections = nn.ModuleDict(self._initial_corrections() if self.folds else {})
        self.to(self.logit_scale.device)  # operators start on the CPU, where a seed always means the same numbers

    def forward(self, **inputs: torch.Tensor):
        """
        The student's `CLIPOutput` for `input_ids`, `attention_mask`, `pixel_values`; gradients reach the operators
        only. In training, just the rows of the token table that the batch looks up are mapped.
        """
        weights = self.materialize(inputs.get("input_ids") if self.training else None)
        return functional_call(self.skeleton, weights, args=(), kwargs=inputs)

    def materialize(self, token_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """
        The student's weights under their state-dict names, in fp32 whatever the autocast.

        Args:
            token_ids: If given, rows of the token table that are not among them stay zero (cheaper in training).
        """
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            operators = {name: operator() for name, operator in self.operators.items()}
            weights = {}
            for index, spec in enumerate(self.kinds):
                mapped = self._map(getattr(self, f"teacher_{index}"), spec, operators, token_ids)
                if (name := _correction_name(spec)) in self.corrections:
                    mapped = mapped + self.corrections[name]()
                if spec.rule.stacked > 1:
                    mapped = mapped.flatten(-1 - len(spec.rule.axes), -len(spec.rule.axes))
                if spec.layer is None:
                    weights[spec.kind] = mapped.contiguous()
                else:
                    weights |= {spec.name(layer): tensor for layer, tensor in enumerate(mapped)}
        return {**weights, **{name: getattr(self, name) for name in self.copied}}

    @torch.no_grad()
    def export(self) -> PreTrainedModel:
        """The student as an ordinary model of the teacher's class, in eval mode."""
        # The config is copied because models write into theirs; its dtype would be that of the teacher's checkpoint.
        student = AutoModel.from_config(copy.deepcopy(self.student_config), dtype=self.logit_scale.dtype)
        student.load_state_dict(self.materialize(), strict=True)
        return student.to(self.logit_scale.device).eval()

    def start(self, operators: Mapping[str, torch.Tensor], depth: Mapping[str, torch.Tensor]) -> None:
        """
        Sets the operators, and all corrections to zero.

        Args:
            operators: All width operators, by name; others are left alone.
            depth: The depth operator `(student_layers, teacher_layers)` of each tower that is cut.
        """
        for spec in self._mapped_kinds():
            if spec.layer is not None:
                operators = {**operators, self._depth_name(spec): depth[spec.tower]}
        for name, operator in self.operators.items():
            operator.start(operators[name])
        for correction in self.corrections.values():
            correction.start(torch.zeros_like(correction.initial))

    @torch.no_grad()
    def correct(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets the corrections so that the student has these weights (a state dict); its token table stays mapped."""
        mapped = self.materialize()
        for spec in self.kinds:
            if (name := _correction_name(spec)) in self.corrections:
                change = self._student_tensor(weights, spec) - self._student_tensor(mapped, spec)
                self.corrections[name].start(self.corrections[name]() + change)

    def _map(
        self,
        tensor: torch.Tensor,
        spec: TensorSpec,
        operators: Mapping[str, torch.Tensor],
        token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        if spec.tower not in self.cut:
            return tensor
        rank = len(spec.rule.axes)
        along = {
            axis - rank: operators[name]
            for axis, space in enumerate(spec.rule.axes)
            if (name := self._operator_name(space, spec.tower)) in operators
        }
        if spec.rule.lookup and token_ids is not None:
            rows = token_ids.unique()
            mapped = project_axes(tensor[rows], along)
            return mapped.new_zeros(len(tensor), mapped.shape[1]).index_copy(0, rows, mapped)
        mapped = project_axes(tensor, along)
        return mapped if spec.layer is None else mix_depth(mapped, operators[self._depth_name(spec)])

    def _operator_name(self, space: str | None, tower: str | None) -> str | None:
        return None if space is None else _operator_name(self.family, space, tower, self.ties)

    def _depth_name(self, spec: TensorSpec) -> str:
        if self.config.depth_per == "tower":
            return f"{spec.tower}_depth"
        module = spec.kind.split("*.")[1].rpartition(".")[0]  # weight and bias of a module share theirs
        return f"{spec.tower}_depth_{module.split('.')[-1]}"

    def _initial_operators(self, teacher: PretrainedConfig) -> dict[str, Operator]:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed)
        # What data decides, and what it may say of layers.
        later = dict.fromkeys(CALIBRATED_INITIALIZERS, "similarity") | dict.fromkeys(SELECTIONS, "score")
        functions = {**INITIALIZERS, **dict.fromkeys(later, _not_yet_known)}
        initialize = _named(functions, "initializer", config.initializer or "diagonal")
        shapes = operator_shapes(self.family, self._mapped_kinds(), teacher, self.student_config, self.ties)
        initial = {name: initialize(shape, generator) for name, shape in shapes.items()}
        waits = config.initializer in later
        rules = {**DEPTH_RULES, later[config.initializer]: None} if waits else DEPTH_RULES
        choose_layers = _named(rules, "depth", config.depth)
        for spec in self._mapped_kinds():
            if spec.layer is not None:
                big, small = (
                    getattr(c, f"{spec.tower}_config").num_hidden_layers for c in (teacher, self.student_config)
                )
                depth = _not_yet_known((small, big)) if waits else one_hot_depth(choose_layers(big, small), big)
                initial[self._depth_name(spec)] = depth
        return {name: self._operator(value) for name, value in initial.items()}

    def _initial_corrections(self) -> dict[str, Operator]:
        weights = self.skeleton.state_dict()
        return {
            _correction_name(spec): self._operator(_not_yet_known(self._student_tensor(weights, spec).shape))
            for spec in self._mapped_kinds()
            if not spec.rule.lookup
        }

    def _mapped_kinds(self) -> list[TensorSpec]:
        return [spec for spec in self.kinds if spec.tower in self.cut]

    def _operator(self, initial: torch.Tensor) -> Operator:
        return Operator(initial, decay_to_zero=self.config.decay_towards == "zero")

    def _student_tensor(self, weights: Mapping[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        """The student's tensor of a kind, stacked over layers."""
        if spec.layer is None:
            return weights[spec.kind]
        layers = getattr(self.student_config, f"{spec.tower}_config").num_hidden_layers
        return torch.stack([weights[spec.name(layer)] for layer in range(layers)])

    def _apply(self, fn: Callable, *args, **kwargs):
        self.skeleton._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def train(self, mode: bool = True):
        self.skeleton.train(mode)
        return super().train(mode)


def operator_shapes(
    family: Family,
    kinds: list[TensorSpec],
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    ties: Mapping[str, str],
) -> dict[str, tuple[int, ...]]:
    """
    The width operators that a mapping needs, in the order of the table: `(small, big)`, or `(layers, small, big)` for
    a space that is private to a layer. A joint embedding that keeps its size has no operator.

    Args:
        family: Its table.
        kinds: The kinds of tensors.
        teacher: The teacher's config.
        student: The student's config.
        ties: Spaces that are mapped by the operators of others, as `operator_ties` gives them.
    """
    shapes = {}
    for spec in kinds:
        for space in (ties.get(space, space) for space in spec.rule.axes if space is not None):
            small, big = (family.size(space, spec.tower, config) for config in (student, teacher))
            if space in family.shared_spaces and small == big:
                continue
            layered = space.removesuffix(".in") in family.layer_spaces
            layers = (getattr(teacher, f"{spec.tower}_config").num_hidden_layers,) if layered else ()
            shapes[_operator_name(family, space, spec.tower, ties)] = (*layers, small, big)
    return shapes


def operator_ties(config: ClipMapConfig) -> dict[str, str]:
    """
    The spaces that have no operator of their own, with those whose operator they go through. What reads the residual
    stream, or the values, does so through the operator that writes them (A.3), and vision embeddings write the stream;
    a calibrated start knows better ones for the last two.

    Args:
        config: Says how operators start, and whether those of the FFN are tied.
    """
    ties = {"residual.in": "residual"}
    if config.initializer != "calibrated":
        ties |= {"value.in": "value", "patch": "residual"}
    return {**ties, "ffn.in": "ffn"} if config.tie_ffn else ties


def _operator_name(family: Family, space: str, tower: str | None, ties: Mapping[str, str]) -> str:
    space = ties.get(space, space).replace(".", "_")
    return space if space in family.shared_spaces else f"{tower}_{space}"


def _correction_name(spec: TensorSpec) -> str:
    return spec.kind.replace(".", "-")  # modules cannot have dots in their names


def _not_yet_known(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def _stack(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]
) -> list[TensorSpec]:
    """Registers the teacher's tensors, stacked over layers, as `teacher_{i}`; returns what the i-th is."""
    groups = defaultdict(dict)
    for name, spec in specs.items():
        if spec.tower is not None:
            tensor = tensors[name]
            if spec.rule.stacked > 1:
                tensor = tensor.unflatten(0, (spec.rule.stacked, -1))
            groups[spec.kind][spec.layer] = (spec, tensor)
    kinds = []
    for layers in groups.values():
        spec = next(iter(layers.values()))[0]
        stacked = layers[None][1] if spec.layer is None else torch.stack([layers[i][1] for i in sorted(layers)])
        module.register_buffer(f"teacher_{len(kinds)}", stacked.clone(), persistent=False)
        kinds.append(spec)
    return kinds


def _named(functions: Mapping[str, Callable], what: str, name: str) -> Callable:
    if name not in functions:
        raise ValueError(f"{what}={name!r} is unknown; allowed are {sorted(functions)}.")
    return functions[name]
