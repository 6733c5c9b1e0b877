"""What Inductor must know: passes over its graphs, and the keys of its caches."""
