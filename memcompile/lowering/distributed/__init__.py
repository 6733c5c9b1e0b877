"""A table of which each rank has a part, and the collectives between them."""
