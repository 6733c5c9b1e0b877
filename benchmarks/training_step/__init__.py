"""The benchmark of a whole training step: what a table costs, against its slots and its peers."""
