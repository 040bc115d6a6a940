"""The comparison of two builds: what changed, what became slower or larger, and conditions on it."""
