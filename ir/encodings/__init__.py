"""Encodings: quantized block forms of values. Importing this package registers all forms."""

# ruff: noqa: F401

import treadle.ir.encodings.coded_forms
import treadle.ir.encodings.gguf_forms
import treadle.ir.encodings.rounded_forms
import treadle.ir.encodings.zero_forms
