"""Lowering to kernels: a graph as a flat list of kernel calls over buffers. Entry point: `routine_writer.lower`."""
