"""Tasks of models with heads: one file per task, and shared files for loading, batching and labels."""
