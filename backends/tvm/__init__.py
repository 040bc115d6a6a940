"""The TVM backend: it lowers graphs to its own kernels, with weights packed in panels and temporaries in one arena."""
