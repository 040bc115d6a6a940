"""Frontends, which read or trace a model and build a graph (the DSL, checkpoints and other formats)."""
