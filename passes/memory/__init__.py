"""Placement of buffers with lifetimes in one arena: read instances, place, search, check. docs/memory.md says how."""
