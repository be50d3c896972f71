"""What the studies share: `initializers.py`, `methods.py` and `ternary.py` train many students and compare them."""
