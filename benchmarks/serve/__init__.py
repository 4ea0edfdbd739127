"""Figures of drawing through Triton: see the section in `benchmarks/README.md`."""
