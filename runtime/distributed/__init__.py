"""Ranks of a sharded model as processes: how they start, meet, and end."""
