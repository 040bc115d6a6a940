"""Products of 8-bit and 16-bit numbers: rounded and packed operands, matrix units, products of pairs."""
