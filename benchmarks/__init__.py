"""Measurements: each module is one recipe with a `main(argv)`, and appends rows to benchmarks/results/."""
