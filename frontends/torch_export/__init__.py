"""Import through torch.export: a module as a graph with weights. `importer.from_torch` is the entry point."""
