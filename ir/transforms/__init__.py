"""Transforms from graph to graph: copies, inlined calls, folded repetitions, gradients, wider dtypes."""
