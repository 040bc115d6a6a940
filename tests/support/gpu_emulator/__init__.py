"""An emulator of CUDA kernels: the host's C++ compiler compiles their text, and threads are fibers."""
