"""What the commands in scripts/, the benchmarks, the soak and the tests share."""
