"""ONNX export: any graph as a ModelProto at a chosen opset. `exporter.export_onnx` is the way in."""
