"""Kernels for devices: the lanes of a specification become threads, and its loops become text in a device's language."""
