"""The training losses: pure functions of the features of a student and its teachers, each in a file of its own."""

from collections.abc import Callable, Mapping

from clipmap_hf.losses.affinity import affinity_loss
from clipmap_hf.losses.contrastive import contrastive_loss
from clipmap_hf.losses.feature import feature_loss
from clipmap_hf.losses.hidden import hidden_loss
from clipmap_hf.losses.interactive import interactive_loss
from clipmap_hf.losses.labels import labels_loss
from clipmap_hf.losses.relational import relational_loss
from clipmap_hf.losses.sigmoid import sigmoid_loss


__all__ = [
    "EMBEDDING_LOSSES",
    "LIST_LOSSES",
    "LOSSES",
    "MATCHED_LOSSES",
    "PAIR_LOSSES",
    "affinity_loss",
    "check_losses",
    "check_texts",
    "contrastive_loss",
    "feature_loss",
    "hidden_loss",
    "interactive_loss",
    "labels_loss",
    "loss_weights",
    "relational_loss",
    "sigmoid_loss",
]

LOSSES = {
    "affinity": affinity_loss,
    "contrastive": contrastive_loss,
    "feature": feature_loss,
    "hidden": hidden_loss,
    "interactive": interactive_loss,
    "labels": labels_loss,
    "relational": relational_loss,
    "sigmoid": sigmoid_loss,
}
EMBEDDING_LOSSES = ("feature", "interactive")  # compare embeddings directly: student and teacher must be equally wide
PAIR_LOSSES = ("contrastive", "sigmoid")  # need no teacher
MATCHED_LOSSES = (*PAIR_LOSSES, "interactive")  # need texts that belong to their images
LIST_LOSSES = ("labels",)  # need a fixed list of texts


def check_losses(losses: Mapping[str, float | Callable]) -> None:
    """
    Checks that losses can be trained.

    Args:
        losses: The weight of each loss, by its name in `LOSSES`; a loss with weight 0 is only logged. Under another
            name, a function `(student, *teachers) -> tensor` of `ClipFeatures`, whose weight is 1.

    Raises:
        ValueError: If a name is unknown, or a function has the name of a loss in `LOSSES`; if a weight is negative or
            not finite, all weights are 0, or only `hidden` has a weight above 0.
    """
    own = {name for name, value in losses.items() if callable(value)}
    if unknown := sorted(set(losses) - own - set(LOSSES)):
        raise ValueError(
            f"losses={dict(losses)} has unknown names {unknown}; allowed are {sorted(LOSSES)}, or a function in place "
            "of the weight."
        )
    if taken := sorted(own & set(LOSSES)):
        raise ValueError(f"The losses {taken} are ours; give your function another name.")
    weights = loss_weights(losses)
    if not any(weights.values()) or not all(0 <= weight < float("inf") for weight in weights.values()):
        raise ValueError(f"losses={dict(losses)} must have weights of at least 0, and some weight above 0.")
    if {name for name, weight in weights.items() if weight} == {"hidden"}:
        raise ValueError("The hidden loss alone would not train the projections; add a loss that reads embeddings.")


def check_texts(
    losses: Mapping[str, float | Callable], *, paired: bool, listed: bool = False, mixed: bool = False
) -> None:
    """
    Checks that losses can be trained on the texts that there are.

    Args:
        losses: As for `check_losses`.
        paired: Whether texts belong to their images.
        listed: Whether they are a fixed list.
        mixed: Whether images are mixed with others, so that no text belongs to them any more.

    Raises:
        ValueError: If one of the losses cannot.
    """
    trained = sorted(name for name, weight in loss_weights(losses).items() if weight)
    why, remedy = "not all of these do", "give pairs alone, without train_images and train_texts"
    if paired:
        why, remedy = "mix changes the images", "leave mix out"
    if (mixed or not paired) and (matched := [name for name in trained if name in MATCHED_LOSSES]):
        raise ValueError(
            f"The losses {matched} need texts that belong to their images, and {why}. Take of "
            f"{sorted(set(LOSSES) - {*MATCHED_LOSSES, *LIST_LOSSES})}, or {remedy}."
        )
    if not listed and (of_lists := [name for name in trained if name in LIST_LOSSES]):
        raise ValueError(f"The losses {of_lists} need a fixed list of texts; give labels, or leave the losses out.")


def loss_weights(losses: Mapping[str, float | Callable]) -> dict[str, float]:
    """Returns the weight of each loss; that of a function is 1."""
    return {name: 1.0 if callable(value) else value for name, value in losses.items()}
