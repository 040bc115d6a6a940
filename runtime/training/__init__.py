"""Training: optimizers as graphs that write over the weights, and schedules of learning rates."""
