"""A program: a model with the options that it is compiled with."""
