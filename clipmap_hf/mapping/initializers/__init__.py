"""How width operators start, one function a file.

`INITIALIZERS: name -> function(shape, generator)` need no data;
`CALIBRATED_INITIALIZERS: name -> function(statistics, teacher, student_config)` start from a teacher's activations;
`SELECTIONS: name -> whether it looks at pairs` are one-hot, and `clipmap_hf.selection` has their functions.
"""

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
