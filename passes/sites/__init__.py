"""Candidate sites: where a graph does what a fused op could do, whether or not a rule takes it."""
