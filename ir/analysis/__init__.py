"""What follows from a graph: where an axis goes, what a run costs, which inputs to try, what weights alone decide."""
