"""The IR: what a model is made of, and what can be said about it. Of the project it imports `files/` alone.

errors            the error family                    samples           what an op is tested on
sizes, types      size expressions, dtypes, dims      composites        bodies of composite ops
axes, dtype_rules the two rule notations              interpreter       the meaning of a graph, in NumPy
operation, ops/   what an op is, and all of them      differentiate     gradients
op_registry       ops by name                         outline, inline   repeated blocks folded and unfolded
graph, builder    functions of nodes; making them     literals          constants; initial_values, how weights start
text/             printer and parser                  following         where an axis goes, what it meets (encounters)
verifier          what every graph must satisfy       cost              operations and bytes
attention_terms   masks and biases, and visitors      tolerances        how near to its meaning a number must be
hashing, clone    structural identity, copies         target            what a graph is compiled for
"""
