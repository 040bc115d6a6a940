"""Quantization: which weights are held in fewer bits, in which form, and why: a plan, its checker, and applying it."""
