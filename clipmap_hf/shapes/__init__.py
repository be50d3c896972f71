"""Chooses the shape of a student, which is the width and depth of both towers, within a budget."""

from clipmap_hf.shapes.choice import Candidate, Choice, choose_shape
from clipmap_hf.shapes.energy import kept_energy
from clipmap_hf.shapes.search import search_shape


__all__ = ["Candidate", "Choice", "choose_shape", "kept_energy", "search_shape"]
