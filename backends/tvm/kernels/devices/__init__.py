"""Kernels for devices: the lanes of a specification become threads, and its loops text in a device's language."""
