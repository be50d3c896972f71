"""Whole runs: start, map, select, distill, make ternary, and write what came out."""
