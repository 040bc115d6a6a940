"""Graphs made of graphs: copies, calls put in place, repetitions folded, gradients, wider dtypes."""
