"""Product-key search: the operators that find the slots."""
