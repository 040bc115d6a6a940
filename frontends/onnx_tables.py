"""All operators: importing this registers the handlers of every file of them."""

# ruff: noqa: F401

import treadle.frontends.onnx_arithmetic
import treadle.frontends.onnx_attention
import treadle.frontends.onnx_casts
import treadle.frontends.onnx_contrib
import treadle.frontends.onnx_contrib_attention
import treadle.frontends.onnx_functions
import treadle.frontends.onnx_images
import treadle.frontends.onnx_indexing
import treadle.frontends.onnx_products
import treadle.frontends.onnx_quantization
import treadle.frontends.onnx_reductions
import treadle.frontends.onnx_shapes
