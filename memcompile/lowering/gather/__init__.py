"""The operators that read rows of a table, and the sums of their gradients."""
