"""Lowering to kernels: a graph as a flat list of kernel calls over buffers. The entry point is `routine_writer.lower`."""
