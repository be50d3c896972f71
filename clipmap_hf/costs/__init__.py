"""What a model costs: parameters, multiply-accumulates, time and memory; and several models compared."""
