"""Candidate sites: places where a graph computes what a fused op could compute, fused or not."""
