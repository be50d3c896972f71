"""Ternary weights: learned with the teacher's help, packed into 1.6 bits each, and run."""
