"""All ATen operators that are taken: importing this registers the handlers of every file of them."""

# ruff: noqa: F401

import treadle.frontends.torch_export.creation
import treadle.frontends.torch_export.indexing
import treadle.frontends.torch_export.pointwise
import treadle.frontends.torch_export.products
import treadle.frontends.torch_export.reductions
import treadle.frontends.torch_export.shapes
import treadle.frontends.torch_export.windows
import treadle.frontends.torch_export.writing
