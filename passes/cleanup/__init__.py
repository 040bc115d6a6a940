"""Passes that simplify a graph: constant folding, deduplication, dead code, one form for equal expressions."""
