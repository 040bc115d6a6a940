"""Kernels on the CPU: their LLVM code, the cache of compiled kernels, and their calls on TVM's runtime."""
