"""Products of 8-bit and 16-bit numbers: rounding and packing of operands, AMX products, and products of pairs."""
