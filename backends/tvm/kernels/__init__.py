"""Kernels of the TVM backend: frozen specs that generate loops. See docs/kernels.md."""
