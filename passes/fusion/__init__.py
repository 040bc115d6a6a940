"""Passes that fuse ops: each finds in a model's primitives the expression of a fused op."""
