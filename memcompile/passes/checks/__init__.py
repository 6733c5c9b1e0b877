"""Holds a captured graph against the plan, before it is compiled."""
