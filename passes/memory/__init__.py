"""Placement of buffers with lifetimes in one arena: read instances, place buffers, search, check. See
docs/memory.md.
"""
