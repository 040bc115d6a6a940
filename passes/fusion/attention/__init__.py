"""Fusion of attention: finds attention written in primitives, in any layout, with any masks and biases."""
