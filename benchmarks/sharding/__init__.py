"""The benchmark of a sharded memory layer: its traffic against the formulas, and where its steps' time goes."""
