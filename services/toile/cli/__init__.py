"""The `toile` command."""
