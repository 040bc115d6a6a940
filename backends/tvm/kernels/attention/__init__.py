"""Attention: the kernels, what they share, and the softmax, masks and biases of a row of scores."""
