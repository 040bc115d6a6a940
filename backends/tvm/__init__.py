"""The TVM backend: lowering to kernels of our own, weights in panels, one arena."""
