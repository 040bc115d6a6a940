"""The model zoo, declared in the DSL: one file a family, with its table of checkpoint names."""
