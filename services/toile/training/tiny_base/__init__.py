"""The recipe of the tiny base: data, stages, evaluation. `python -m toile.training.tiny_base`."""
