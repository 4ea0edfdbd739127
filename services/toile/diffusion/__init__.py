"""Bases, adapters, denoisers and the pipelines over them."""
