"""ONNX import: from a file or a ModelProto to a graph with weights. `importer.import_onnx` is the entry point."""
