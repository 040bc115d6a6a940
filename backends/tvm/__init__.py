"""The TVM backend: lowering to our own kernels, weights packed in panels, one arena."""
