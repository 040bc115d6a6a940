"""Candidate sites: subgraphs that a fused op could compute, fused or not."""
