"""What is trained, against whom and by which losses: a module for each stage of training."""
