"""What models cost: parameters, multiply-accumulates, time and memory; and comparisons of several models."""
