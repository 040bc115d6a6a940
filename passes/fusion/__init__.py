"""Passes that find a fused op in what models spell out."""
