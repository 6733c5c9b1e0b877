"""The table of values, which owns its rows: the parameter, the state of its rows, and the rules that step them."""
