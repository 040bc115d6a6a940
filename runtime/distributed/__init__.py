"""Ranks of a sharded model as processes: start, communication, and end."""
