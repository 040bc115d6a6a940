"""Kernels of the TVM backend: generators, frozen specs that emit loops. See docs/kernels.md."""
