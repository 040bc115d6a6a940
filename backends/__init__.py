"""Backends: a backend lowers a graph to readable source code, and runs it."""
