"""A memory layer whose table processes share: `python -m benchmarks.sharding`."""
