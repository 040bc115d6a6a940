"""`treadle bench`: compare a model with the tools that its users come from, each in its own process, in turns."""
