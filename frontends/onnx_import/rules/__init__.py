"""Import rules for ONNX operators, one file for each kind."""
