"""Sizes: expressions of symbols, their bounds, their text, and their behaviour as Python numbers."""
