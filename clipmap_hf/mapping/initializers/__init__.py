"""How width operators start, one function a file.

`INITIALIZERS: name -> function(shape, generator)` need no data;
`CALIBRATED_INITIALIZERS: name -> function(statistics, teacher, student_config)` start from a teacher's activations;
`SELECTIONS: name -> whether it looks at pairs` are one-hot, and `clipmap_hf.selection` has their functions.
"""

from clipmap_hf.families import Family
from clipmap_hf.mapping.initializers.calibrated import calibrated
from clipmap_hf.mapping.initializers.diagonal import diagonal
from clipmap_hf.mapping.initializers.importance import importance
from clipmap_hf.mapping.initializers.kaiming import kaiming
from clipmap_hf.mapping.initializers.random import random
from clipmap_hf.mapping.initializers.xavier import xavier


__all__ = [
    "CALIBRATED_INITIALIZERS",
    "INITIALIZERS",
    "NEED_PAIRS",
    "SELECTIONS",
    "calibrated",
    "check_start",
    "diagonal",
    "importance",
    "kaiming",
    "random",
    "xavier",
]

INITIALIZERS = {"diagonal": diagonal, "kaiming": kaiming, "random": random, "xavier": xavier}
CALIBRATED_INITIALIZERS = {"calibrated": calibrated, "importance": importance}
SELECTIONS = {"magnitude": False, "manual": False, "mope": True, "random_selection": False, "taylor": True}
NEED_PAIRS = (*CALIBRATED_INITIALIZERS, *(name for name, looks in SELECTIONS.items() if looks))


def check_start(family: Family, initializer: str | None) -> None:
    """
    Raises a `ValueError` for a start that goes through the layers, if that is not written for the family.

    Args:
        family: The teacher's.
        initializer: Any name, or `None`.
    """
    if not family.layerwise and initializer in (*CALIBRATED_INITIALIZERS, "mope"):
        allowed = sorted({*INITIALIZERS, *SELECTIONS} - {"mope"})
        raise ValueError(
            f"initializer={initializer!r} goes through the teacher's layers one by one, which is not written for the "
            f"family {family.name!r}. Name one of {allowed}; of these, only 'taylor' reads calibration data."
        )
