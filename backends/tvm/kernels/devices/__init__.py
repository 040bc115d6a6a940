"""Kernels for devices: a specification's lanes become threads, and its loops become CUDA, OpenCL, Metal or WGSL text."""
