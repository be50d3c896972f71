"""Losses: pure functions of `(student, *teachers)` features, one a file."""

from collections.abc import Mapping

from clipmap_hf.losses.affinity import affinity_loss
from clipmap_hf.losses.contrastive import contrastive_loss
from clipmap_hf.losses.feature import feature_loss
from clipmap_hf.losses.hidden import hidden_loss
from clipmap_hf.losses.interactive import interactive_loss
from clipmap_hf.losses.relational import relational_loss
from clipmap_hf.losses.sigmoid import sigmoid_loss


__all__ = [
    "EMBEDDING_LOSSES",
    "LOSSES",
    "PAIR_LOSSES",
    "affinity_loss",
    "check_losses",
    "contrastive_loss",
    "feature_loss",
    "hidden_loss",
    "interactive_loss",
    "relational_loss",
    "sigmoid_loss",
]

LOSSES = {
    "affinity": affinity_loss,
    "contrastive": contrastive_loss,
    "feature": feature_loss,
    "hidden": hidden_loss,
    "interactive": interactive_loss,
    "relational": relational_loss,
    "sigmoid": sigmoid_loss,
}
EMBEDDING_LOSSES = ("feature", "interactive")  # these compare embeddings of student and teacher, of one width
PAIR_LOSSES = ("contrastive", "sigmoid")  # these need no teacher


def check_losses(weights: Mapping[str, float]) -> None:
    """
    Raises a `ValueError` unless the weights by name make a loss.

    Args:
        weights: Of keys of `LOSSES`; one of 0 is only logged.
    """
    if unknown := sorted(set(weights) - set(LOSSES)):
        raise ValueError(f"losses={dict(weights)} has unknown names {unknown}; allowed are {sorted(LOSSES)}.")
    if not any(weights.values()) or not all(0 <= weight < float("inf") for weight in weights.values()):
        raise ValueError(f"losses={dict(weights)} must have weights of at least 0, and one above it.")
    if {name for name, weight in weights.items() if weight} == {"hidden"}:
        raise ValueError("The hidden loss alone would not train the projections; add one that reads embeddings.")
