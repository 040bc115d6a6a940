"""Import rules of ONNX operators, one file for each kind."""
