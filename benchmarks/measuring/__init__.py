"""What the benchmarks share: turns and their statistics, the machine, tables in the README."""
