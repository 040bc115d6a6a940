"""The model zoo, declared in the DSL: one file for each family, with its table of checkpoint names."""
