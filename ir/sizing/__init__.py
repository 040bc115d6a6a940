"""Sizes: expressions of symbols, their bounds, their text, and what Python's numbers make of them."""
