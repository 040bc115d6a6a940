"""The IR: types, ops, graphs, and analyses of graphs. Apart from `treadle.files`, the IR imports no package of the
project.

errors            the error family                    samples           inputs that ops are tested on
sizes, types      size expressions, dtypes, dims      composites        bodies of composite ops
axes, dtype_rules the two rule notations              interpreter       the meaning of a graph, in NumPy
operation, ops/   base classes of ops, and all ops    differentiate     gradients
op_registry       ops by name                         outline, inline   repeated blocks folded and unfolded
graph, builder    functions of nodes; building them   literals          constants; initial_values, how weights start
text/             printer and parser                  following         the uses of one axis (encounters)
verifier          rules that every graph satisfies    cost              operations and bytes
attention_terms   masks and biases, and visitors      tolerances        error bounds of computed numbers
hashing, clone    structural identity, copies         target            the hardware that a graph is compiled for
"""
