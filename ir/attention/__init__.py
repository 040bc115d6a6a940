"""Attention's masks and biases: terms, what they mean, how they are read and visited."""
