"""Kernels that read quantized weights in blocks. Numbers are unpacked in registers and not stored in memory."""
