"""Sharding: a model split over a mesh of devices, by the axis rules of its ops."""
