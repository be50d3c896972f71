"""Losses: pure functions of `(student, *teachers)` features, one a file."""

from clipmap_hf.losses.affinity import affinity_loss
from clipmap_hf.losses.contrastive import contrastive_loss


__all__ = ["LOSSES", "affinity_loss", "contrastive_loss"]

LOSSES = {"affinity": affinity_loss, "contrastive": contrastive_loss}
