"""Derivation of a generation step from a model that is declared over a whole sequence."""
