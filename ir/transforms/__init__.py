"""Transforms from graph to graph: copies, inlined calls, outlined repetitions, gradients, wider dtypes."""
