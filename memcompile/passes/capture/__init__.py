"""Runs the model on fake tensors, and keeps the graphs."""
