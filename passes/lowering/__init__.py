"""From the optimized graph to what a backend spells: its ops, layouts of weights, what is done once."""
