"""Lowering to kernels: a graph as a flat list of kernel calls over buffers. `routine_writer.lower` is the way in."""
