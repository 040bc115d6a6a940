"""Training on texts: batches of tokens, training objectives, and saving of trained models."""
