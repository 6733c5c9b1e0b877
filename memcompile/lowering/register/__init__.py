"""How operators are defined: signatures, fakes, derivatives, vmap rules, FLOPs."""
