"""Frontends: what reads or traces a model and gives a graph (the DSL, checkpoints and other formats)."""
