"""Graphs in the formats of other tools: Graphviz, Model Explorer, and our JSON with a published schema."""
