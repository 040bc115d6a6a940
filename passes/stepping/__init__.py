"""The step of generation, derived from a model that is declared over a whole sequence."""
