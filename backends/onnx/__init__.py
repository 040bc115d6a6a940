"""ONNX export: any graph as a ModelProto at a chosen opset. The public function is `exporter.export_onnx`."""
