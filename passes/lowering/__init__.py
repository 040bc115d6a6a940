"""From the optimized graph to what a backend spells: what is spelled, in which layouts weights lie, what is done once."""
