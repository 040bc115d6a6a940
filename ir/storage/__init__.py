"""Where elements lie: storages, views of them by strides, and what ops are in such views."""
