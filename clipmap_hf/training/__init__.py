"""Training: arguments, the stages (what is trained, against whom, by which losses) and the one Accelerate loop."""
