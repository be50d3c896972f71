"""Selection: a student that keeps some of its teacher's parts, by scores, as one-hot operators for the same mapper.

`CRITERIA: name -> function(teacher, batches, seed)` gives the scores.
"""

from clipmap_hf.selection.criteria import magnitude, manual, random_selection, taylor
from clipmap_hf.selection.mope import mope


__all__ = ["CRITERIA", "magnitude", "manual", "mope", "random_selection", "taylor"]

CRITERIA = {
    "magnitude": magnitude,
    "manual": manual,
    "mope": mope,
    "random_selection": random_selection,
    "taylor": taylor,
}
