"""Compiled models in `.treadle` files (docs/artifacts.md): writing, reading, loading, and the tasks of such a file."""
