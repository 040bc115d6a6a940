"""The common part of the backends that emit Python: emission, code for axes and attention, the executable."""
