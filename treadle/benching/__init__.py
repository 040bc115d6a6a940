"""`treadle bench`: compare a model with other tools. Each tool runs in its own process; the tools take turns."""
