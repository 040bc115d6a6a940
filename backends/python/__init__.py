"""What the backends that emit Python share: emission, spelling of axes and attention, the executable."""
