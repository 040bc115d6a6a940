"""Analyses of graphs: uses of an axis, the cost of a run, inputs to try, computations on weights alone."""
