"""Plans a model: finds its FFNs, chooses some, rehearses, and puts the memory in."""
