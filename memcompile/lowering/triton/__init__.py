"""The GPU's kernels, in Triton, and how Inductor is told of them."""
