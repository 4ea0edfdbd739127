"""Recipes that train adapters, and the jobs that run them."""
