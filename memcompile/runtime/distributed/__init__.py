"""A model on many devices: sharded values, replicas, and what PyTorch's parallelisms must know."""
