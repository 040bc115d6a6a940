"""Passes on products with weights: linear layers, gates, epilogues, projections, scales."""
