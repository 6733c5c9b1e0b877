"""What all benchmarks share: timing in turns, limits of machines, workers, tables, figures and the command line."""
