"""Rewrites a captured graph: a new graph, where plan() changes the model."""
