"""Measured comparisons. Each writes its results as data beside its code."""
