"""What people ask of models with heads: one file a task, over one way to load, batch and read labels."""
