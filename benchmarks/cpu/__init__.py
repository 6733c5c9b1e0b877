"""A memory layer against its peers on the CPU: `python -m benchmarks.cpu`."""
