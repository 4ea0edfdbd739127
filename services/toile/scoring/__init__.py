"""Scorers: one number of one image each."""
