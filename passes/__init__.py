"""Passes: rewrites of a graph, one file each, and the manager that runs a flat list of them."""
