"""Backends: each lowers a graph to source that a person can read, and runs it."""
