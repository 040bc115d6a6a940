"""Kernels that read weights in blocks: numbers are unpacked in registers and not stored in memory."""
