"""The calibrated start: a student computed from what the teacher's activations on some pairs are like."""
