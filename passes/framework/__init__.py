"""The framework of passes: the manager and its log, patterns, and the search for them."""
