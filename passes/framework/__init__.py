"""The framework for passes: the pass manager, its log, patterns and pattern search."""
