"""Products of numbers of 16 bits: rows rounded and laid out, matrix units, products of pairs."""
