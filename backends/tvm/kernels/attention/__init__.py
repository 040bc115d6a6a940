"""Attention: the kernels, their common parts, and the softmax, masks and biases of a row of scores."""
