"""What a model costs: parameters, multiply-accumulates per tower and bytes, from its config alone."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, CLIPConfig, PreTrainedModel

from clipmap_hf.files.tables import markdown_table, scaled_column


__all__ = ["Cost", "CostReport", "cost_columns", "cost_table", "model_cost", "parameter_count", "with_bytes_of"]


@dataclass(frozen=True)
class Cost:
    """
    What a CLIP model costs.

    Args:
        parameters: All parameters, each tied one counted once.
        token_embedding_parameters: Those of the token embedding, a lookup that costs no multiplications.
        vision_macs: Multiply-accumulates of one image through the vision tower and its projection.
        text_macs: The same of one caption of full context length through the text tower and its projection.
        bytes: Size of the weights, in the dtype that was asked for (fp32 by default).
    """

    parameters: int
    token_embedding_parameters: int
    vision_macs: int
    text_macs: int
    bytes: int

    @property
    def parameters_without_token_embedding(self) -> int:
        """Parameters that take part in multiplications or additions."""
        return self.parameters - self.token_embedding_parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image and one caption."""
        return self.vision_macs + self.text_macs


def model_cost(config: CLIPConfig, dtype: torch.dtype = torch.float32) -> Cost:
    """
    The cost of the model that `config` describes, without allocating it.

    Matrix products and convolutions are counted, attention in full (the causal half is not subtracted), as in the
    tables of TinyCLIP and CLIP-Map; additions, norms and activations are not.

    Args:
        config: Of a `CLIPModel` or a model with the same parts; left as it is.
        dtype: Of the weights in the file.
    """
    with torch.device("meta"):  # here scaled-dot-product attention falls apart into products that the counter sees
        model = AutoModel.from_config(copy.deepcopy(config))
        vision_macs, text_macs = _vision_macs(model), _text_macs(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parameters = sum(sizes.values())
    token_embedding = sum(
        size for name, size in sizes.items() if name.endswith(("token_embedding.weight", "word_embeddings.weight"))
    )
    return Cost(parameters, token_embedding, vision_macs, text_macs, parameters * dtype.itemsize)


def parameter_count(config: CLIPConfig) -> int:
    """All parameters of the model that `config` describes: those of `model_cost`, in a tenth of its time."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModel.from_config(copy.deepcopy(config)).parameters())


def with_bytes_of(cost: Cost, model: PreTrainedModel) -> Cost:
    """The cost with the bytes that a model's tensors have, packed ones among them."""
    return replace(cost, bytes=sum(tensor.nbytes for tensor in model.state_dict().values()))


def cost_table(costs: Mapping[str, Cost]) -> str:
    """
    An aligned Markdown table of named costs; the last column compares parameters with the first entry.

    Raises:
        ValueError: If there is nothing to show.
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
    """Columns of a table, header first: parameters with and without the token embedding, MACs of each tower."""
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
    """Costs by name; prints as `cost_table`."""

    def __str__(self) -> str:
        return cost_table(self)
