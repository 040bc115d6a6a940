"""Training: what a step is compiled from, the texts that it reads, and what is saved of it."""
