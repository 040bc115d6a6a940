"""Tensors of a model as Python objects: methods, indexing, and the shape changes that these lower to."""
