"""All supported ATen operators: importing this module registers the handlers of every file."""

# ruff: noqa: F401

import treadle.frontends.torch_export.complex_numbers
import treadle.frontends.torch_export.creation
import treadle.frontends.torch_export.indexing
import treadle.frontends.torch_export.interpolation
import treadle.frontends.torch_export.pointwise
import treadle.frontends.torch_export.products
import treadle.frontends.torch_export.reductions
import treadle.frontends.torch_export.shapes
import treadle.frontends.torch_export.windows
import treadle.frontends.torch_export.writing
