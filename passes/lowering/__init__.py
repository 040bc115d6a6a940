"""Lowering of the optimized graph for a backend: its ops, layouts of weights, and work that is done once."""
