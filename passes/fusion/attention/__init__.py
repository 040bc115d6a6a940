"""Attention, found in what models spell out in any layout, with any masks and biases."""
