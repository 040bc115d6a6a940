"""What each operator of ONNX becomes, a file a kind."""
