"""Backends: each lowers a graph to readable source, and runs it."""
