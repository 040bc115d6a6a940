"""All import rules: importing this module registers the handlers of every file."""

# ruff: noqa: F401

import treadle.frontends.onnx_import.rules.arithmetic
import treadle.frontends.onnx_import.rules.attention
import treadle.frontends.onnx_import.rules.casts
import treadle.frontends.onnx_import.rules.constants
import treadle.frontends.onnx_import.rules.contrib
import treadle.frontends.onnx_import.rules.contrib_attention
import treadle.frontends.onnx_import.rules.functions
import treadle.frontends.onnx_import.rules.images
import treadle.frontends.onnx_import.rules.indexing
import treadle.frontends.onnx_import.rules.parts
import treadle.frontends.onnx_import.rules.pooling
import treadle.frontends.onnx_import.rules.products
import treadle.frontends.onnx_import.rules.quantization
import treadle.frontends.onnx_import.rules.reductions
import treadle.frontends.onnx_import.rules.shapes
