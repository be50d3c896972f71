"""Computes what a model costs from its config alone: parameters, multiply-accumulates per tower, and bytes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, CLIPConfig, PretrainedConfig, PreTrainedModel

from clipmap_hf.config.heads import shown_heads
from clipmap_hf.files.tables import markdown_table, scaled_column


__all__ = [
    "Cost",
    "CostReport",
    "cost_columns",
    "cost_table",
    "model_cost",
    "parameter_count",
    "vision_cost",
    "with_bytes_of",
]


@dataclass(frozen=True)
class Cost:
    """
    The cost of a CLIP model.

    Args:
        parameters: Number of all parameters. Tied parameters are counted once.
        token_embedding_parameters: Parameters of the token embedding, a lookup that costs no multiplications.
        vision_macs: Multiply-accumulates of one image in the vision tower and its projection.
        text_macs: Multiply-accumulates of one caption of full context length in the text tower and its projection.
        bytes: Size of the weights in the requested dtype (fp32 by default).
    """

    parameters: int
    token_embedding_parameters: int
    vision_macs: int
    text_macs: int
    bytes: int

    @property
    def parameters_without_token_embedding(self) -> int:
        """Number of parameters that take part in multiplications or additions."""
        return self.parameters - self.token_embedding_parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image and one caption."""
        return self.vision_macs + self.text_macs


def model_cost(config: CLIPConfig, dtype: torch.dtype = torch.float32) -> Cost:
    """
    Computes the cost of the model that `config` describes, without allocating the model.

    Matrix products and convolutions are counted, but additions, norms and activations are not. Attention is counted in
    full (the causal half is not subtracted), as in the tables of TinyCLIP and CLIP-Map.

    Args:
        config: Config of a `CLIPModel` or of a model with the same parts. It is not changed.
        dtype: Dtype of the weights in the file.
    """
    with torch.device("meta"):  # attention runs as matrix products on this device, and the counter sees these
        model = _model(config)
        vision_macs, text_macs = _vision_macs(model), _text_macs(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parameters = sum(sizes.values())
    token_embedding = sum(
        size for name, size in sizes.items() if name.endswith(("token_embedding.weight", "word_embeddings.weight"))
    )
    return Cost(parameters, token_embedding, vision_macs, text_macs, parameters * dtype.itemsize)


def vision_cost(config: CLIPConfig) -> Cost:
    """Computes the cost of the vision tower and its projection alone, of the model that `config` describes."""
    with torch.device("meta"):
        model = _model(config)
        macs = _vision_macs(model)
    tower = (model.vision_model, model.visual_projection)
    parameters = sum(weight.numel() for part in tower for weight in part.parameters())
    return Cost(parameters, 0, macs, 0, parameters * torch.float32.itemsize)


def parameter_count(config: CLIPConfig) -> int:
    """Counts all parameters of the model that `config` describes. Takes a tenth of the time of `model_cost`."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _model(config).parameters())


def _model(config: CLIPConfig) -> PreTrainedModel:
    """The model that `config` describes, in evaluation: BatchNorms compute otherwise in training."""
    return AutoModel.from_config(copy.deepcopy(config)).eval()


def with_bytes_of(cost: Cost, model: PreTrainedModel) -> Cost:
    """Returns a copy of `cost` with the bytes of a model's tensors, some of which may be packed."""
    return replace(cost, bytes=sum(tensor.nbytes for tensor in model.state_dict().values()))


def cost_table(costs: Mapping[str, Cost]) -> str:
    """
    Formats costs as an aligned Markdown table. Its last column compares the parameters with those of the first entry.

    Args:
        costs: The costs by name.

    Raises:
        ValueError: If there are no costs.
    """
    if not costs:
        raise ValueError("costs is empty; give at least one `name: Cost`.")
    entries = list(costs.values())
    file = scaled_column([cost.bytes for cost in entries], "MK")
    kept = (f"{cost.parameters / entries[0].parameters:.1%}" for cost in entries)
    return markdown_table(
        [
            ["model", *costs],
            *cost_columns(entries),
            [f"weights ({file[0]}B)", *file[1:]],
            ["parameters kept", *kept],
        ]
    )


def cost_columns(costs: Sequence[Cost]) -> list[list[str]]:
    """Makes table columns, header first: parameters with and without the token embedding, and MACs of each tower."""
    sizes = [n for cost in costs for n in (cost.parameters, cost.parameters_without_token_embedding)]
    sizes = scaled_column(sizes, "MK")
    macs = scaled_column([n for cost in costs for n in (cost.vision_macs, cost.text_macs)], "GMK")
    return [
        [f"parameters ({sizes[0]})", *sizes[1::2]],
        [f"without token embedding ({sizes[0]})", *sizes[2::2]],
        [f"vision MACs ({macs[0]})", *macs[1::2]],
        [f"text MACs ({macs[0]})", *macs[2::2]],
    ]


def _vision_macs(model: PreTrainedModel) -> int:
    config = model.config.vision_config
    image = torch.empty(1, config.num_channels, config.image_size, config.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(pixel_values=image)
    return counter.get_total_flops() // 2


def _text_macs(model: PreTrainedModel) -> int:
    caption = torch.zeros(1, model.config.text_config.max_position_embeddings, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_text_features(input_ids=caption)
    return counter.get_total_flops() // 2


class CostReport(dict[str, Cost]):
    """
    A dict of costs by name. It prints as a `cost_table`, with a note below.

    Args:
        costs: The costs by name, as a dict takes them.
        note: What there is to say besides, such as which heads the student has.
    """

    def __init__(self, *costs: Any, note: str = "", **named: Cost):
        super().__init__(*costs, **named)
        self.note = note

    @classmethod
    def of(cls, teacher: PretrainedConfig, student: PretrainedConfig) -> "CostReport":
        """Compares the models that two configs describe, and says which heads the student has."""
        return cls(teacher=model_cost(teacher), student=model_cost(student), note=shown_heads(teacher, student))

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [cost_table(self), self.note]))
