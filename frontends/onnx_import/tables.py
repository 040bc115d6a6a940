"""All operators: importing this registers the handlers of every file of them."""

# ruff: noqa: F401

import treadle.frontends.onnx_import.arithmetic
import treadle.frontends.onnx_import.attention
import treadle.frontends.onnx_import.casts
import treadle.frontends.onnx_import.contrib
import treadle.frontends.onnx_import.contrib_attention
import treadle.frontends.onnx_import.functions
import treadle.frontends.onnx_import.images
import treadle.frontends.onnx_import.indexing
import treadle.frontends.onnx_import.pooling
import treadle.frontends.onnx_import.products
import treadle.frontends.onnx_import.quantization
import treadle.frontends.onnx_import.reductions
import treadle.frontends.onnx_import.shapes
