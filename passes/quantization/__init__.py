"""Quantization: the weights to quantize, their encodings, and the reasons: a plan, its checker, and its application."""
