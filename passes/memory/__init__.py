"""Placement of buffers with lifetimes in one arena: read instances, place, search, check. See docs/memory.md."""
