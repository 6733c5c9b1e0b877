"""What the benchmarks of all devices share."""
