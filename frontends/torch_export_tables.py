"""All ATen operators that are taken: importing this registers the handlers of every file of them."""

# ruff: noqa: F401

import treadle.frontends.torch_export_creation
import treadle.frontends.torch_export_indexing
import treadle.frontends.torch_export_pointwise
import treadle.frontends.torch_export_products
import treadle.frontends.torch_export_reductions
import treadle.frontends.torch_export_shapes
