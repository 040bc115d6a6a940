"""The ops, one file per family. Importing this package registers them all."""

# ruff: noqa: F401

import treadle.ir.ops.activated_products
import treadle.ir.ops.activations
import treadle.ir.ops.arithmetic
import treadle.ir.ops.attention
import treadle.ir.ops.attention_parts
import treadle.ir.ops.blocks
import treadle.ir.ops.cached_attention
import treadle.ir.ops.caches
import treadle.ir.ops.call
import treadle.ir.ops.collectives
import treadle.ir.ops.convolution
import treadle.ir.ops.elementwise
import treadle.ir.ops.embedding_sums
import treadle.ir.ops.indexing
import treadle.ir.ops.layout
import treadle.ir.ops.logic
import treadle.ir.ops.losses
import treadle.ir.ops.merged_products
import treadle.ir.ops.normalization
import treadle.ir.ops.parts
import treadle.ir.ops.pooling
import treadle.ir.ops.products
import treadle.ir.ops.reductions
import treadle.ir.ops.residual_norms
import treadle.ir.ops.rotary
import treadle.ir.ops.rounding
import treadle.ir.ops.sampling
import treadle.ir.ops.shapes
