"""Finds FFNs in graphs, and proves that each may be replaced."""
