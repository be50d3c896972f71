"""How width operators start: `name -> function(shape, generator)`, one a file."""

from clipmap_hf.mapping.initializers.diagonal import diagonal
from clipmap_hf.mapping.initializers.kaiming import kaiming
from clipmap_hf.mapping.initializers.random import random
from clipmap_hf.mapping.initializers.xavier import xavier


__all__ = ["INITIALIZERS", "diagonal", "kaiming", "random", "xavier"]

INITIALIZERS = {"diagonal": diagonal, "kaiming": kaiming, "random": random, "xavier": xavier}
