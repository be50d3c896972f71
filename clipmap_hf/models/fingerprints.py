"""What tells a model, its config or its tokenizer from others, wherever they are stored."""

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig


__all__ = ["config_values", "model_fingerprint", "tokenizer_fingerprint"]

_PROVENANCE = {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "architectures"}


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights with their names, shapes and types, wherever and however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer: its vocabulary and rules, and its special tokens."""
    if hasattr(tokenizer, "sp_model"):  # SentencePiece, which SigLIP's has in place of a backend
        state = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    else:
        # Every call writes its padding and truncation into the backend, which says nothing about the vocabulary.
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    content = json.dumps([state, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """What of a model's config decides what is trained: not where it was loaded from, nor by which version."""
    values = config.to_dict()
    towers = {name: values.pop(name) for name in ("vision_config", "text_config")}
    nested = {f"{tower}.{name}": value for tower, inner in towers.items() for name, value in inner.items()}
    return {name: value for name, value in {**values, **nested}.items() if name.split(".")[-1] not in _PROVENANCE}
