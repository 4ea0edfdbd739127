"""Toile: photographs in, a style trained into SDXL, designs generated, ranked and refined."""

__version__ = "0.1.0"
