"""ONNX import: a file or a ModelProto as a graph with weights. `importer.import_onnx` is the entry point."""
