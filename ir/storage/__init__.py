"""Memory of values: storages, views of them by strides, and the effect of ops on views."""
