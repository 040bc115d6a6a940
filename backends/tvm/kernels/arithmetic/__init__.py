"""Arithmetic in vector registers: functions of one lane, exponentials, polynomials, conversions."""
