"""Running kernels on devices: device memory, tables of launches, and a runtime for each kind of device."""
