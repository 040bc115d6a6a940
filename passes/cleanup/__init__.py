"""Passes that leave a graph simpler: folded, deduplicated, in one spelling."""
