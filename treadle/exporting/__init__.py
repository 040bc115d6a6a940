"""Graphs in the formats of other tools: Graphviz, Model Explorer, and JSON with a published schema."""
