"""Passes that fuse ops. Each finds a fused op's expression in the primitives of a model."""
