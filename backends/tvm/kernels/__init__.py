"""Kernels of the TVM backend, written by generators. Each generator is a frozen spec that emits loops. See
docs/kernels.md.
"""
