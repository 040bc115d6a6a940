"""Memory of values: storages, views of storages by strides, and the effect of ops on views."""
