"""The operators that update rows of a table in place, and the mathematics of skipped steps."""
