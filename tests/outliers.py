"""Teachers with huge activations, such as large CLIPs have: some channels of the stream, and some tokens."""

import torch
from transformers import CLIPModel

from clipmap_hf.models.towers import Tower


@torch.no_grad()
def plant_outliers(model: CLIPModel, pairs: dict[str, torch.Tensor], size: float, behind: int = 0) -> CLIPModel:
    """
    Makes two channels of each tower's stream huge, behind some layer and all that follow it; and in the text tower
    the first token ten times as huge, which attention then uses as a sink. Where a LayerNorm reads the stream, its
    scale and shift make up for that as well as they can without knowing how long a token's vector is.

    Args:
        model: Changed in place.
        pairs: From which the lengths of the streams are taken.
        size: What is added, in medians of the stream's absolute values.
        behind: How many layers are in front of the first huge stream.

    Returns:
        The model.
    """
    for name in ("vision", "text"):
        tower = Tower(model, name)
        streams = _read_streams(tower, pairs)
        added = size * tower.embed(pairs).abs().median()
        norms = list(streams)[2 * behind :]
        for channel in (3, tower.config.hidden_size // 2):
            for norm in norms:
                _make_up(norm, streams[norm], channel, added)
            if behind:
                tower.layers[behind - 1].mlp.fc2.bias[channel] += added
            elif name == "vision":
                tower.model.pre_layrnorm.bias[channel] += added
            else:
                positions = tower.model.embeddings.position_embedding.weight
                positions[:, channel] += added
                positions[0, channel] += 9 * added
    return model


def _make_up(norm: torch.nn.LayerNorm, stream: torch.Tensor, channel: int, added: torch.Tensor) -> None:
    """Has a LayerNorm give nearly what it gave before something is added to a channel, which is added here."""
    before = stream.std(dim=-1, correction=0).mean()
    stream[:, channel] += added
    shift = norm.weight / before * added / stream.shape[1]
    shift[channel] -= norm.weight[channel] / before * added
    norm.bias += shift
    norm.weight *= stream.std(dim=-1, correction=0).mean() / before


def _read_streams(tower: Tower, pairs: dict[str, torch.Tensor]) -> dict[torch.nn.LayerNorm, torch.Tensor]:
    """What each LayerNorm of the layers and the last one read, in order, `(tokens, width)`."""
    norms = [norm for layer in tower.layers for norm in (layer.layer_norm1, layer.layer_norm2)] + [tower.final_norm]
    streams = {}

    def keep(norm, inputs, _):
        streams[norm] = inputs[0].flatten(0, -2).clone()

    hooks = [norm.register_forward_hook(keep) for norm in norms]
    stream = tower.embed(pairs)
    for layer in tower.layers:
        stream = tower.through(layer, stream)
    tower.final_norm(stream)
    for hook in hooks:
        hook.remove()
    return streams
