"""Training on texts: batches of tokens, what a model is to foretell in them, and saving what was trained."""
