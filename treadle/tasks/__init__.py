"""Tasks of models with heads: one file per task, with shared loading, batching and labels."""
