"""Our own kernels for the TVM backend: generators, each a frozen spec that writes loops. See docs/kernels.md."""
