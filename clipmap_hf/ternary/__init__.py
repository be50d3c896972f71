"""Ternary weights: quantizers that make them, packing into 1.6 bits per weight, and modules that run them."""
