"""Attention's masks and biases: terms, their meaning, their text form, and visitors."""
