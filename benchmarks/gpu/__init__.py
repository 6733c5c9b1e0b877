"""A memory layer against its peers on a GPU: `python -m benchmarks.gpu`."""
