"""Training: optimizers as graphs that overwrite the weights, and learning rate schedules."""
